"""Writes Hugging Face weights: safetensors, with an index when there is more than one file."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Sequence
from math import prod
from pathlib import Path

from torch import Tensor

from checkpoints_conversion.dtypes import BYTES
from megatron_ft.errors import ConfigError
from megatron_ft.files import write_json
from megatron_ft.models.architecture import Architecture
from megatron_ft.models.weights import Placed

_UNITS = {"": 1, "KB": 10**3, "MB": 10**6, "GB": 10**9, "KIB": 2**10, "MIB": 2**20, "GIB": 2**30}


def parse_size(text: str) -> int:
    """Bytes in "5GB", "200MB", "2GiB". Raises ConfigError."""
    match = re.fullmatch(r"\s*(\d+(?:\.\d+)?)\s*([a-zA-Z]*)\s*", text)
    if not match or match[2].upper() not in _UNITS or float(match[1]) <= 0:
        raise ConfigError(f"--max_shard_size {text}: give a size such as 5GB or 200MB")
    return int(float(match[1]) * _UNITS[match[2].upper()])


def plan_files(placed: Iterable[Placed], arch: Architecture, dtype: str, max_bytes: int) -> list[list[Placed]]:
    """Tensors in the order of the model, file by file, none over max_bytes unless one tensor alone is."""
    files: list[list[Placed]] = [[]]
    size = 0
    for one in placed:
        bytes_needed = prod(one.rule.full_shape(arch)) * BYTES[dtype]
        if files[-1] and size + bytes_needed > max_bytes:
            files.append([])
            size = 0
        files[-1].append(one)
        size += bytes_needed
    return files


def write_safetensors(
    folder: Path, files: Sequence[Sequence[Placed]], arch: Architecture, full: Callable[[Placed], Tensor]
) -> int:
    """Write the planned files. Returns their number. Memory: one file."""
    from safetensors.torch import save_file

    weight_map: dict[str, str] = {}
    total = 0
    for number, planned in enumerate(files, 1):
        name = f"model-{number:05d}-of-{len(files):05d}.safetensors" if len(files) > 1 else "model.safetensors"
        tensors = {}
        for one in planned:
            # Parts of one tensor share its storage, which safetensors refuses: each gets its own.
            parts = [part.contiguous().clone() for part in one.rule.to_hf(arch, full(one))]
            tensors.update(zip(one.hf_keys, parts, strict=True))
        save_file(tensors, folder / name, metadata={"format": "pt"})
        weight_map.update(dict.fromkeys(tensors, name))
        total += sum(t.numel() * t.element_size() for t in tensors.values())
    if len(files) > 1:
        index = {"metadata": {"total_size": total}, "weight_map": weight_map}
        write_json(folder / "model.safetensors.index.json", index)
    return len(files)
