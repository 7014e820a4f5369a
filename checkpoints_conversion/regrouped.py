"""Safetensors files of any sizes, joined and split into files of a largest size, in the order of their tensors."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from math import prod
from pathlib import Path

from checkpoints_conversion.hf_target import INDEX, SINGLE, Entry
from checkpoints_conversion.stream import disk_errors
from checkpoints_conversion.torch_zip import as_bytes
from megatron_ft.files import write_json
from megatron_ft.models.safetensors_file import SafetensorsFile, header_of


@dataclass(frozen=True)
class _Stored:
    """A tensor in a file."""

    file: SafetensorsFile
    entry: Entry

    @property
    def nbytes(self) -> int:
        return prod(self.entry[2]) * self.entry[1].itemsize


def regroup(folder: Path, files: Sequence[str], max_bytes: int) -> int:
    """Replace the files of a folder by those that transformers reads, with an index if there are several. Return their number.

    Only a file with a single tensor may exceed max_bytes. A file is removed when the last of its tensors is in another.
    """
    tensors = [one for name in files for one in _tensors(SafetensorsFile(folder / name, "export it again"))]
    groups = _groups(tensors, max_bytes)
    count, last = len(groups), {id(one.file): one for one in tensors}
    names = (
        [f"model-{number:05d}-of-{count:05d}.safetensors" for number in range(1, count + 1)] if count > 1 else [SINGLE]
    )
    for name, group in zip(names, groups, strict=True):
        _write(folder / name, group)
        for one in group:
            if one is last[id(one.file)]:
                one.file.path.unlink()
    if count > 1:
        pairs = zip(names, groups, strict=True)
        weight_map = {one.entry[0]: name for name, group in pairs for one in group}
        write_json(
            folder / INDEX, {"metadata": {"total_size": sum(one.nbytes for one in tensors)}, "weight_map": weight_map}
        )
    return count


def _tensors(file: SafetensorsFile) -> list[_Stored]:
    return [_Stored(file, (name, dtype, shape)) for name, (dtype, shape, _, _) in file.tensors.items()]


def _groups(tensors: Sequence[_Stored], max_bytes: int) -> list[list[_Stored]]:
    groups: list[list[_Stored]] = [[]]
    size = 0
    for one in tensors:
        if groups[-1] and size + one.nbytes > max_bytes:
            groups.append([])
            size = 0
        groups[-1].append(one)
        size += one.nbytes
    return groups


def _write(path: Path, group: Sequence[_Stored]) -> None:
    with disk_errors(), path.open("wb") as file:
        file.write(header_of([one.entry for one in group])[0])
        for one in group:
            file.write(as_bytes(one.file.read(one.entry[0])))
