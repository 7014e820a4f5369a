"""Conversion beside `cp`: Hugging Face -> TP8-PP4 -> Hugging Face, against copying the same bytes, in the same run.

    python benchmarks/convert.py --gigabytes 4 --folder /tmp/bench

Prints the ratio of each conversion's time to cp's (both ending with the data on the disk) and the peak memory of converting two
models, one three times the other: it should not grow. Every conversion runs in a process of its own, whose peak is the kernel's figure.
"""

from __future__ import annotations

import argparse
import json
import multiprocessing
import os
import shutil
import subprocess
import sys
import time
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
SIZES = {"hidden_size": 2048, "intermediate_size": 5632, "num_attention_heads": 32, "num_key_value_heads": 8}
LAYER_BYTES = 2 * (2048 * 2048 * 2 + 2 * 512 * 2048 + 3 * 2048 * 5632 + 2 * 2048)
TP, PP = "8", "4"


def make_model(folder: Path, gigabytes: float) -> int:
    """A random bf16 Llama of about that size, file by file. Returns its bytes."""
    import torch
    from safetensors.torch import save_file

    from megatron_ft.models import llama
    from megatron_ft.models.weights import placed_rules

    layers = max(4, round(gigabytes * 1e9 / LAYER_BYTES / 4) * 4)
    config = {
        "model_type": "llama", **SIZES, "num_hidden_layers": layers, "vocab_size": 32003, "torch_dtype": "bfloat16",
        "max_position_embeddings": 4096, "rms_norm_eps": 1e-5,
    }  # fmt: skip
    folder.mkdir(parents=True)
    (folder / "config.json").write_text(json.dumps(config))
    arch = llama.from_hf(config)
    noise = torch.randn(1 << 26).to(torch.bfloat16)
    weight_map, tensors, number, total = {}, {}, 1, 0
    for placed in placed_rules(arch, llama.rules(arch)):
        for key, shape in zip(placed.hf_keys, placed.rule.hf_shapes(arch), strict=True):
            count = torch.Size(shape).numel()
            tensors[key] = torch.roll(noise, number)[:count].reshape(shape).clone()
            weight_map[key], total = f"model-{number}.safetensors", total + 2 * count
        if sum(t.numel() for t in tensors.values()) > 5e8:
            save_file(tensors, folder / f"model-{number}.safetensors")
            tensors, number = {}, number + 1
    save_file(tensors, folder / f"model-{number}.safetensors")
    index = {"metadata": {"total_size": total}, "weight_map": weight_map}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    return total


def elsewhere(function, *arguments):
    """In a process of its own: the kernel counts a parent's memory, as it was at the start, into its children's peak."""
    with ProcessPoolExecutor(1, mp_context=multiprocessing.get_context("spawn")) as pool:
        return pool.submit(function, *arguments).result()


def timed(*command: str) -> tuple[float, float]:
    """(seconds, peak GB of memory) of a process, its data on the disk at the end."""
    os.sync()
    started = time.monotonic()
    process = subprocess.Popen(command, stdout=subprocess.DEVNULL)
    _, status, usage = os.wait4(process.pid, 0)
    if status:
        sys.exit(f"failed: {' '.join(command)}")
    os.sync()
    return time.monotonic() - started, usage.ru_maxrss * 1024 / 1e9


def round_trip(folder: Path, gigabytes: float) -> dict[str, float]:
    """One model there and back beside cp; leaves nothing."""
    hf, made, back = folder / "hf", folder / "megatron", folder / "back"
    total = elsewhere(make_model, hf, gigabytes)
    ours = [sys.executable, "-m", "megatron_ft"]
    layout = ["--tensor_model_parallel_size", TP, "--pipeline_model_parallel_size", PP]
    startup, _ = timed(sys.executable, "-c", "import torch")
    copy, _ = timed("cp", "-r", str(hf), str(folder / "copy"))
    shutil.rmtree(folder / "copy")
    there, there_peak = timed(*ours, "hf-to-megatron", str(hf), str(made), *layout)
    home, home_peak = timed(*ours, "megatron-to-hf", str(made), str(back))
    again, _ = timed("cp", "-r", str(hf), str(folder / "copy"))
    same = elsewhere(check, hf, back)
    shutil.rmtree(folder)
    return {
        "gigabytes": total / 1e9, "cp": (copy + again) / 2, "to_megatron": there, "to_hf": home, "import_torch": startup,
        "peak_to_megatron": there_peak, "peak_to_hf": home_peak, "same": same,
    }  # fmt: skip


def check(hf: Path, back: Path) -> bool:
    """Bit for bit, tensor by tensor."""
    import torch

    from megatron_ft.models.hf_source import HfSource

    first, second = HfSource(hf), HfSource(back)
    return set(first.files) == set(second.files) and all(
        torch.equal(first._tensor(key).view(torch.int16), second._tensor(key).view(torch.int16)) for key in first.files
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--gigabytes", type=float, default=4.0)
    parser.add_argument("--folder", type=Path, default=Path("bench-convert"))
    options = parser.parse_args()
    small = round_trip(options.folder, options.gigabytes / 3)
    large = round_trip(options.folder, options.gigabytes)
    print(f"{os.cpu_count()} cores")
    for run in (small, large):
        print(f"{run['gigabytes']:.2f} GB: cp {run['cp']:.1f} s, import torch {run['import_torch']:.1f} s")
        for way, name in (("to_megatron", f"HF -> TP{TP}-PP{PP}"), ("to_hf", f"TP{TP}-PP{PP} -> HF")):
            times, peak = run[way] / run["cp"], run[f"peak_{way}"]
            print(f"    {name}: {run[way]:.1f} s, {times:.2f} x cp, peak memory {peak:.2f} GB")
        print(f"    {'the same bits' if run['same'] else 'DIFFERENT'}")
    growth = max(large[k] / small[k] for k in ("peak_to_megatron", "peak_to_hf"))
    print(f"peak memory for {large['gigabytes'] / small['gigabytes']:.1f} times the model: {growth:.2f} times")
    sys.exit(0 if small["same"] and large["same"] else 1)


if __name__ == "__main__":
    main()
