"""Feeds damaged input to the readers of models and checkpoints: no crash, no hang, no memory beyond what the input is worth.

    python benchmarks/fuzz_checkpoints.py [--safetensors 1000000] [--pickles 1000000] [--archives 300000] [--metadata 300000] ...

As fuzz_readers.py, for safetensors headers, torch.save's archives and the pickles in them, torch_dist's .metadata, and the config.json
of both kinds of folder. A safetensors file that is accepted must be accepted by the safetensors library, with the same tensors.
"""

from __future__ import annotations

import argparse
import io
import json
import os
import pickle
import random
import struct
import sys
import tempfile
import zipfile
from collections.abc import Callable
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from benchmarks import fuzz_readers
from benchmarks.fuzz_readers import change_json, damaged
from checkpoints_conversion.megatron_llm_args import harmless
from checkpoints_conversion.torch_dist import plan_torch_dist
from megatron_ft.checkpoints.folder import CheckpointConfig, read_config, write_config
from megatron_ft.checkpoints.restricted import read_metadata
from megatron_ft.errors import CheckpointError
from megatron_ft.models.families import parse_hf_config
from megatron_ft.models.safetensors_file import SafetensorsFile
from megatron_ft.models.torch_file import TensorRef, TorchFile
from megatron_ft.models.weights import placed_rules

MEMORY = Path("/dev/shm") if Path("/dev/shm").is_dir() else Path(tempfile.gettempdir())
FOLDER = Path(tempfile.mkdtemp(prefix="fuzz-", dir=MEMORY))
COUNTS = {
    "safetensors": 1_000_000, "pickles": 1_000_000, "archives": 400_000, "metadata": 400_000,
    "hf_config": 400_000, "config": 200_000,
}  # fmt: skip


def fuzz(name: str, inputs: int, seed: int = 0):
    """(how many were refused and accepted, seconds of the slowest). Raises what crashes a reader, and TimeoutError."""
    return fuzz_readers.fuzz(name, inputs, seed, TARGETS)


def put(name: str, data: bytes) -> Path:
    path = FOLDER / name
    path.write_bytes(data)
    return path


# safetensors


def make_safetensors(rng: random.Random) -> bytes:
    data = rng.choice(SAFE)
    if rng.randrange(2):
        return damaged(rng, data)
    length = int.from_bytes(data[:8], "little")
    header = json.loads(data[8 : 8 + length])
    change_json(rng, header)
    text = json.dumps(header).encode()
    return len(text).to_bytes(8, "little") + text + data[8 + length :]


def read_safetensors(data: bytes) -> None:
    from safetensors.torch import load

    file = SafetensorsFile(put("model.safetensors", data), "fetch it again")
    ours = {name: file.read(name) for name in file.tensors}
    theirs = load(data)
    assert ours.keys() == theirs.keys()
    for name, tensor in ours.items():
        other = theirs[name]
        assert tensor.dtype == other.dtype and tensor.shape == other.shape
        assert tensor.reshape(-1).view(torch.uint8).equal(other.reshape(-1).view(torch.uint8))


# torch.save


def archive(pickled: bytes) -> bytes:
    """A sound archive around a pickle that may not be."""
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w") as file:
        file.writestr("archive/data.pkl", pickled)
        for number in range(4):
            file.writestr(f"archive/data/{number}", bytes(range(64)))
    return buffer.getvalue()


def make_pickle(rng: random.Random) -> bytes:
    data = bytearray(damaged(rng, rng.choice(PICKLES)))
    for _ in range(rng.choice((0, 0, 1, 2))):
        at = rng.randrange(len(data) + 1)
        data[at:at] = rng.choice(OPCODES)
    return archive(bytes(data))


def make_archive(rng: random.Random) -> bytes:
    return damaged(rng, rng.choice(ARCHIVES))


def read_torch(data: bytes) -> None:
    value = TorchFile(put("model.pt", data), harmless).value
    for key in list(value.values())[:20] if isinstance(value, dict) else []:
        for entry in list(key.values())[:20] if isinstance(key, dict) else [key]:
            if isinstance(entry, TensorRef):
                entry.read()


# torch_dist


def make_metadata(rng: random.Random) -> bytes:
    data = bytearray(damaged(rng, rng.choice(METADATA)))
    if rng.randrange(3) == 0:
        at = rng.randrange(len(data) + 1)
        data[at:at] = rng.choice(OPCODES)
    return bytes(data)


# configs


def make_config(rng: random.Random, samples: list[bytes]) -> bytes:
    if rng.randrange(4) == 0:
        return damaged(rng, rng.choice(samples))
    content = json.loads(rng.choice(samples))
    change_json(rng, content)
    return json.dumps(content).encode()


def read_hf_config(data: bytes) -> None:
    from megatron_ft.files import read_json

    family, arch = parse_hf_config(read_json(put("config.json", data)))
    if arch.num_layers < 100:
        assert list(placed_rules(arch, family.rules(arch)))
    family.to_hf(arch, "float32")


def read_our_config(data: bytes) -> None:
    put("config.json", data)
    config = read_config(FOLDER)
    if config.tensor_model_parallel_size < 1 or config.ckpt_format not in ("torch", "torch_dist"):
        raise CheckpointError("refused later")


def _samples() -> None:
    """Sound files, made once."""
    from safetensors.torch import save

    from megatron_ft.models import llama

    kinds = (torch.float32, torch.bfloat16, torch.float16, torch.int64)
    SAFE.append(save({f"layer.{n}.weight": torch.ones(3, n + 1, dtype=kind) for n, kind in enumerate(kinds)}))
    SAFE.append(save({"a": torch.ones(()), "b": torch.ones(0, 4)}, metadata={"format": "pt"}))
    model = {f"decoder.layers.{n}.weight": torch.ones(2, n + 1) for n in range(3)}
    args = argparse.Namespace(num_layers=2, hidden_size=8, lr=1e-4, names=["a", None])
    for state in ({"model": model, "iteration": 3}, {"model": {"language_model": model}, "args": args}):
        buffer = io.BytesIO()
        torch.save(state, buffer)
        ARCHIVES.append(buffer.getvalue())
        with zipfile.ZipFile(buffer) as file:
            PICKLES.append(next(file.read(name) for name in file.namelist() if name.endswith("data.pkl")))
    config = {
        "model_type": "llama", "hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 1, "vocab_size": 31,
        "num_attention_heads": 2, "max_position_embeddings": 64,
    }  # fmt: skip
    arch = llama.from_hf(config)
    placed = list(placed_rules(arch, llama.rules(arch)))
    metadata = plan_torch_dist(FOLDER, placed, arch, lambda one: torch.float32)[1]
    METADATA.extend(pickle.dumps(metadata, protocol) for protocol in (2, 4))
    scaled = {"rope_type": "longrope", "factor": 2.0, "short_factor": [1.0] * 4, "long_factor": [2.0] * 4}
    falcon = {
        **config,
        "model_type": "falcon",
        "num_kv_heads": 2,
        "new_decoder_architecture": True,
        "activation": "relu",
    }
    configs = [config, {**config, "rope_scaling": scaled, "rope_theta": 1e4}, falcon]
    configs.append({**config, "model_type": "qwen2", "use_sliding_window": True, "sliding_window": 9})
    HF_CONFIGS.extend(json.dumps(one).encode() for one in configs)
    write_config(FOLDER, CheckpointConfig(arch, "torch", 1, 1, 128, "release", "fp32"))
    CONFIGS.append((FOLDER / "config.json").read_bytes())


SAFE: list[bytes] = []
ARCHIVES: list[bytes] = []
PICKLES: list[bytes] = []
METADATA: list[bytes] = []
HF_CONFIGS: list[bytes] = []
CONFIGS: list[bytes] = []
_samples()
OPCODES = (
    b"cos\nsystem\n", b"cbuiltins\neval\n", b"R", b"b", b"0", b"2", b"(", b"t", b"}", b"]", b"s", b"u", b"Q", b"\x81", b"\x94",
    b"r" + struct.pack("<I", 1 << 31), b"q\xff", b"j" + struct.pack("<I", 1 << 31), b"\x96" + struct.pack("<Q", 1 << 40),
    b"B" + struct.pack("<I", 1 << 30), b"\x8b" + struct.pack("<I", 1 << 20), b"\x82\x01", b"ctorch\nSize\n", b"h\x00", b".",
)  # fmt: skip
TARGETS: dict[str, tuple[Callable, Callable]] = {
    "safetensors": (make_safetensors, read_safetensors),
    "pickles": (make_pickle, read_torch),
    "archives": (make_archive, read_torch),
    "metadata": (make_metadata, lambda data: read_metadata(put(".metadata", data))),
    "hf_config": (lambda rng: make_config(rng, HF_CONFIGS), read_hf_config),
    "config": (lambda rng: make_config(rng, CONFIGS), read_our_config),
}

if __name__ == "__main__":
    os.environ.setdefault("OMP_NUM_THREADS", "1")
    fuzz_readers.command(__doc__, TARGETS, COUNTS)
