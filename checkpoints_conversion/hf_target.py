"""Writes Hugging Face weights: safetensors files, with an index if there is more than one."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Sequence
from math import prod
from pathlib import Path

import torch
from torch import Tensor

from checkpoints_conversion.stream import Unit
from checkpoints_conversion.torch_zip import as_bytes, write_at
from megatron_ft.errors import ConfigError
from megatron_ft.files import write_json
from megatron_ft.models.architecture import Architecture
from megatron_ft.models.safetensors_file import header_of
from megatron_ft.models.weights import Placed

SINGLE, INDEX = "model.safetensors", "model.safetensors.index.json"
Entry = tuple[str, torch.dtype, tuple[int, ...]]
"""Name, type and shape of a tensor in a file."""
_UNITS = {"": 1, "KB": 10**3, "MB": 10**6, "GB": 10**9, "KIB": 2**10, "MIB": 2**20, "GIB": 2**30}


def parse_size(text: str) -> int:
    """Return the bytes of "5GB", "200MB" or "2GiB". Raise ConfigError for another form."""
    match = re.fullmatch(r"\s*(\d+(?:\.\d+)?)\s*([a-zA-Z]*)\s*", text)
    if not match or match[2].upper() not in _UNITS or float(match[1]) <= 0:
        raise ConfigError(f"--max_shard_size {text}: give a size such as 5GB or 200MB")
    return int(float(match[1]) * _UNITS[match[2].upper()])


def plan_safetensors(
    folder: Path,
    placed: Iterable[Placed],
    arch: Architecture,
    dtype: Callable[[Placed], torch.dtype],
    max_bytes: int,
    entries: Callable[[Placed], list[Entry]] | None = None,
    values: Callable[[Placed, Tensor], Sequence[Tensor]] | None = None,
) -> list[Unit]:
    """Return one unit per file, with tensors in the order of the model. Only a file with a single tensor may exceed max_bytes.

    entries: the tensors of the file that a tensor of the engine becomes; values: makes them. Default: those of Hugging Face, in `dtype`.
    """
    entries = entries or (lambda one: plain_entries(one, arch, dtype(one)))
    values = values or (lambda one, full: one.rule.to_hf(arch, full))
    groups = _groups(list(placed), entries, max_bytes)
    single = len(groups) == 1
    names = [f"model-{n:05d}-of-{len(groups):05d}.safetensors" for n in range(1, len(groups) + 1)]
    paths = [folder / (SINGLE if single else name) for name in names]
    return [_plan_file(path, group, entries, values) for path, group in zip(paths, groups, strict=True)]


def plain_entries(one: Placed, arch: Architecture, dtype: torch.dtype) -> list[Entry]:
    """Return the tensors in Hugging Face of a tensor of the engine."""
    return [(key, dtype, shape) for key, shape in zip(one.hf_keys, one.rule.hf_shapes(arch), strict=True)]


def write_index(folder: Path, units: Sequence[Unit]) -> None:
    """Write the index of tensors and files, if there are several files."""
    if len(units) > 1:
        weight_map = {key: next(iter(unit.files)).name for unit in units for key, _, _ in unit.tensors}
        total = sum(size for unit in units for _, _, size in unit.tensors)
        write_json(folder / INDEX, {"metadata": {"total_size": total}, "weight_map": weight_map})


def _groups(placed: list[Placed], entries: Callable[[Placed], list[Entry]], max_bytes: int) -> list[list[Placed]]:
    groups: list[list[Placed]] = [[]]
    size = 0
    for one in placed:
        needed = sum(prod(shape) * kind.itemsize for _, kind, shape in entries(one))
        if groups[-1] and size + needed > max_bytes:
            groups.append([])
            size = 0
        groups[-1].append(one)
        size += needed
    return groups


def _plan_file(
    path: Path,
    group: Sequence[Placed],
    entries: Callable[[Placed], list[Entry]],
    values: Callable[[Placed, Tensor], Sequence[Tensor]],
) -> Unit:
    tensors = [entry for one in group for entry in entries(one)]
    header, starts = header_of(tensors)
    sizes = [prod(shape) * kind.itemsize for _, kind, shape in tensors]
    place = {key: start for (key, _, _), start in zip(tensors, starts, strict=True)}

    def task(one: Placed) -> tuple[Placed, Callable[[list[int], Tensor], None]]:
        def put(handles: list[int], full: Tensor) -> None:
            for (key, _, _), part in zip(entries(one), values(one, full), strict=True):
                write_at(handles[0], as_bytes(part), place[key])

        return one, put

    return Unit(
        {path: len(header) + sum(sizes)},
        [task(one) for one in group],
        lambda handles: write_at(handles[0], header, 0),
        [(key, shape, size) for (key, _, shape), size in zip(tensors, sizes, strict=True)],
    )
