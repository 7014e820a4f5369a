"""Claim: a step with LoRA or QLoRA is as fast as one of transformers + PEFT (+ bitsandbytes), and takes no more memory.

Full fine-tuning, LoRA and QLoRA of the same model on the same tokens, each with our step and with a plain loop, one thread and one
process each. All are alive at once and take turns, step by step, so that a machine that slows down slows all. Adapters begin with the
same numbers, so the losses show that both compute the same. QLoRA is compared where bitsandbytes is installed.

    python benchmarks/adapters.py [--steps 8] [--hidden 512] [--layers 4] [--seq_length 256] [--rank 16] [--bf16]

Prints seconds of CPU time for a step (median), the peak of resident memory during the steps above that after the imports, and the
ratios. With --bf16 the plain loop trains bf16 weights themselves in full fine-tuning; ours has fp32 copies of them.
"""

from __future__ import annotations

import argparse
import importlib.util
import multiprocessing
import os
import statistics
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from multiprocessing.connection import Connection
from pathlib import Path

os.environ.setdefault("OMP_NUM_THREADS", "1")
sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import torch
from transformers import AutoModelForCausalLM, BitsAndBytesConfig, LlamaConfig, LlamaForCausalLM

from benchmarks.train_step import BATCH, LR, MICRO, Conversations, plain_loop
from checkpoints_conversion.hf_to_megatron import HfToMegatron, convert
from megatron_ft.config.sections import Batch, Data, Numerics, Optimizer, Parallelism
from megatron_ft.data.loader import ChatDataset, Choices
from megatron_ft.data.roles import loss_weights
from megatron_ft.engine.parallel import process_groups

KINDS = ("full", "LoRA", "QLoRA")
WARM_UP = 2


def our_step(kind: str, folder: Path, bf16: bool, dataset: ChatDataset, layout) -> Callable[[int], float]:
    """megatron_ft's step, built as `finetune` does."""
    from megatron_ft.adapters.base import load_base
    from megatron_ft.adapters.lora import fill_adapters
    from megatron_ft.adapters.peft_files import open_peft
    from megatron_ft.checkpoints.folder import describe, find_checkpoint
    from megatron_ft.checkpoints.quantised import nf4_of
    from megatron_ft.engine.optimizer import make_optimizer, make_schedule
    from megatron_ft.training import setup
    from megatron_ft.training.step import Stepper

    checkpoint = find_checkpoint(folder / ("nf4" if kind == "QLoRA" else "plain"))
    config, numerics = describe(checkpoint), Numerics(bf16=bf16)
    peft = None if kind == "full" else open_peft(folder / "adapter", config.architecture)
    model = setup.make_model(
        config.architecture, layout, Data(seq_length=dataset.seq_length), Parallelism(), numerics,
        lora=peft.lora if peft else None, nf4=nf4_of(config),
    )  # fmt: skip
    load_base(checkpoint, config, setup.bare(model), layout)
    if peft:
        fill_adapters(setup.bare(model), peft.read, 1, 0)
    section = Optimizer(lr=LR, lr_decay_style="constant")
    optimizer = make_optimizer(model, section, numerics, distributed=False)
    make_schedule(optimizer, section, Batch(train_iters=10**6)).step(increment=1)
    stepper = Stepper(model, layout, MICRO, BATCH)
    return lambda consumed: stepper.train(dataset, consumed, optimizer).loss


def their_step(kind: str, folder: Path, bf16: bool, dataset: ChatDataset) -> Callable[[int], float]:
    """A step of transformers, with PEFT and bitsandbytes."""
    dtype = torch.bfloat16 if bf16 else torch.float32
    options = {}
    if kind == "QLoRA":
        four_bits = BitsAndBytesConfig(
            load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_compute_dtype=dtype,
            llm_int8_skip_modules=["lm_head"],
        )  # fmt: skip
        options = {"quantization_config": four_bits, "device_map": "cpu"}
    model = AutoModelForCausalLM.from_pretrained(folder / "hf", dtype=dtype, **options)
    if kind != "full":
        from peft import PeftModel

        model = PeftModel.from_pretrained(model, folder / "adapter", is_trainable=True)
    # As loaded, the model is in evaluation mode. There, on a CPU with AVX512-BF16, bitsandbytes computes linears in bf16.
    return plain_loop(model.train(), dataset)


def serve(pipe: Connection, who: str, kind: str, folder: Path, options: argparse.Namespace) -> None:
    """Make steps when asked to, and answer (CPU seconds, loss); at the end the peak of memory."""
    torch.set_num_threads(1)
    if who == "theirs" and kind != "full":
        import peft  # noqa: F401 - imports are no memory of a step
    dataset = chats(options)
    with process_groups() as layout:
        before = kilobytes("VmRSS")
        make = (our_step, layout) if who == "ours" else (their_step,)
        step = make[0](kind, folder, options.bf16, dataset, *make[1:])
        Path("/proc/self/clear_refs").write_text("5")  # the peak begins anew
        pipe.send(None)
        for number in iter(pipe.recv, None):
            started = time.process_time()
            loss = step(number * BATCH)
            pipe.send((time.process_time() - started, loss))
        pipe.send((kilobytes("VmHWM") - before) / 1024)


def chats(options: argparse.Namespace) -> ChatDataset:
    samples = Conversations((options.steps + WARM_UP) * BATCH, options.seq_length + 1, options.vocab)
    return ChatDataset([samples], loss_weights(), Choices(options.seq_length, packed=False))


def kilobytes(entry: str) -> int:
    with open("/proc/self/status") as file:
        return int(next(line for line in file if line.startswith(f"{entry}:")).split()[1])


@contextmanager
def worker(who: str, kind: str, folder: Path, options: argparse.Namespace) -> Iterator[Connection]:
    """A process that is ready to make steps."""
    context = multiprocessing.get_context("spawn")
    here, there = context.Pipe()
    process = context.Process(target=serve, args=(there, who, kind, folder, options), daemon=True)
    process.start()
    there.close()
    here.recv()
    yield here
    process.join()


def compare(kind: str, folder: Path, options: argparse.Namespace) -> None:
    with worker("ours", kind, folder, options) as ours, worker("theirs", kind, folder, options) as theirs:
        pipes, seconds, apart = {"ours": ours, "theirs": theirs}, {"ours": [], "theirs": []}, 0.0
        for number in range(options.steps + WARM_UP):
            losses = []
            for name in sorted(pipes, reverse=bool(number % 2)):
                pipes[name].send(number)
                spent, loss = pipes[name].recv()
                seconds[name].append(spent)
                losses.append(loss)
            apart = max(apart, abs(losses[0] - losses[1]))
        memory = {name: finished(pipe) for name, pipe in pipes.items()}
    report(kind, {name: found[WARM_UP:] for name, found in seconds.items()}, memory, apart)


def finished(pipe: Connection) -> float:
    pipe.send(None)
    return pipe.recv()


def report(kind: str, seconds: dict[str, list[float]], memory: dict[str, float], apart: float) -> None:
    time_of = {name: statistics.median(found) for name, found in seconds.items()}
    pairs = sorted(b / a for a, b in zip(seconds["ours"], seconds["theirs"], strict=True))
    print(
        f"{kind:6} step: ours {time_of['ours']:6.2f} s, theirs {time_of['theirs']:6.2f} s, {statistics.median(pairs):5.2f} times as "
        f"fast (pairs: {pairs[0]:.2f} to {pairs[-1]:.2f})   peak: ours {memory['ours']:6.0f} MiB, theirs {memory['theirs']:6.0f} MiB, "
        f"ratio {memory['ours'] / memory['theirs']:.2f}   losses apart {apart:.1e}",
        flush=True,
    )


def prepare(folder: Path, options: argparse.Namespace) -> int:
    """Write the model, an adapter of PEFT, and the two checkpoints; return the number of parameters."""
    from peft import LoraConfig, get_peft_model

    config = LlamaConfig(
        hidden_size=options.hidden, intermediate_size=options.hidden * 11 // 4, num_hidden_layers=options.layers,
        num_attention_heads=8, num_key_value_heads=4, vocab_size=options.vocab, max_position_embeddings=options.seq_length,
    )  # fmt: skip
    torch.manual_seed(0)
    model = LlamaForCausalLM(config)
    model.save_pretrained(folder / "hf")
    size = sum(p.numel() for p in model.parameters())
    dtype = "bf16" if options.bf16 else "fp32"
    for name, more in (("plain", {}), ("nf4", {"quantize": "nf4"})):
        convert(HfToMegatron(str(folder / "hf"), str(folder / name), params_dtype=dtype, **more))
    chosen = LoraConfig(
        r=options.rank, lora_alpha=16, target_modules="all-linear", task_type="CAUSAL_LM", init_lora_weights=True
    )
    get_peft_model(model, chosen).save_pretrained(folder / "adapter")
    return size


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    defaults = {"steps": 8, "hidden": 512, "layers": 4, "seq_length": 256, "vocab": 4096, "rank": 16}
    for name, default in defaults.items():
        parser.add_argument(f"--{name}", type=int, default=default)
    parser.add_argument("--bf16", action="store_true")
    options = parser.parse_args()
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory() as name:
        size = prepare(Path(name), options)
        print(
            f"{size / 1e6:.1f} M parameters, {'bf16' if options.bf16 else 'fp32'}, rank {options.rank}, {BATCH} rows of "
            f"{options.seq_length} a step; seconds of CPU time; torch {torch.__version__}",
            flush=True,
        )
        for kind in KINDS:
            if kind == "QLoRA" and not importlib.util.find_spec("bitsandbytes"):
                print("QLoRA: bitsandbytes is not installed, nothing to compare with")
                continue
            compare(kind, Path(name), options)


if __name__ == "__main__":
    main()
