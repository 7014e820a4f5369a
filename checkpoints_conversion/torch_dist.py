"""megatron-core's torch_dist format, written and read without a process group and without megatron-core.

It is torch.distributed.checkpoint's format (.metadata records which bytes of which .distcp file hold which slice of which tensor) plus
megatron-core's metadata.json and common.pt. Keys are those of GPTModel.sharded_state_dict(prefix="model.") with per-layer
("non-homogeneous") names and global layer numbers. A tensor is stored whole, the vocabulary without padding rows: megatron-core fills
the rows that a layout adds with zeros, so one checkpoint loads with every TP and PP size.

Source of the layout: torch/distributed/checkpoint/{metadata,filesystem}.py and megatron/core/dist_checkpointing.
"""

from __future__ import annotations

import io
import pickle
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import TypeGuard

import torch
from torch import Tensor
from torch.distributed.checkpoint.filesystem import CURRENT_DCP_VERSION, _StorageInfo
from torch.distributed.checkpoint.metadata import (
    STORAGE_TYPES,
    BytesStorageMetadata,
    ChunkStorageMetadata,
    Metadata,
    MetadataIndex,
    TensorProperties,
    TensorStorageMetadata,
)

from checkpoints_conversion.stream import Unit
from checkpoints_conversion.torch_zip import Slot, TorchZip, write_at
from megatron_ft.checkpoints.folder import MODEL_PREFIX, CheckpointConfig
from megatron_ft.checkpoints.restricted import file_slice, read_metadata
from megatron_ft.errors import CheckpointError
from megatron_ft.files import write_json
from megatron_ft.models.architecture import Architecture
from megatron_ft.models.weights import Placed, Rule, placed_rules
from megatron_ft.wording import counted

MAX_FILE_BYTES = 5 * 10**9
_ENVELOPE = 1 << 20  # upper bound of the bytes that torch.save adds to a tensor
_BACKENDS = {
    "sharded_backend": "torch_dist",
    "sharded_backend_version": 1,
    "common_backend": "torch",
    "common_backend_version": 1,
}


def plan_torch_dist(
    folder: Path,
    placed: Iterable[Placed],
    arch: Architecture,
    dtype: Callable[[Placed], torch.dtype],
    max_file_bytes: int = MAX_FILE_BYTES,
) -> tuple[list[Unit], Metadata]:
    """Return one unit per .distcp file, and the content of .metadata (see finish_torch_dist)."""
    entries: dict[str, STORAGE_TYPES] = {}
    places: dict[MetadataIndex, _StorageInfo] = {}
    waiting = list(reversed(list(placed)))
    units: list[Unit] = []
    while waiting:
        name = f"__{len(units)}_0.distcp"
        at, tasks, tensors, fixed = 0, [], [], []
        while waiting and at < max_file_bytes:
            one = waiting.pop()
            key, shape = MODEL_PREFIX + one.dist_key, torch.Size(one.rule.full_shape(arch))
            archive = TorchZip(Slot(dtype(one), tuple(shape)), base=at)
            entries[key], index = _entry(key, shape, dtype(one))
            places[index] = _StorageInfo(name, at, archive.size)
            tasks.append((one, _putter(archive)))
            tensors.append((key, tuple(shape), archive.slots[0].nbytes))
            at += archive.size
            if one.rule.stage == "layer" and one.rule.cut != "replicated" and key.endswith(".weight"):
                # The place of Transformer Engine's fp8 scales; a plain load of megatron-core fails without it.
                extra = MetadataIndex(key.removesuffix("weight") + "_extra_state/shard_0_1")
                entries[extra.fqn], places[extra] = BytesStorageMetadata(), _StorageInfo(name, at, len(_NOTHING))
                fixed.append(at)
                at += len(_NOTHING)
        units.append(Unit({folder / name: at}, tasks, _finisher(fixed), tensors))
    return units, Metadata(entries, storage_data=places, version=CURRENT_DCP_VERSION)


def finish_torch_dist(folder: Path, metadata: Metadata, iteration: int = 0) -> None:
    """Write the small files; .metadata is the last, as in torch: if it exists, the checkpoint is complete."""
    torch.save({"checkpoint_version": 3.0, "iteration": iteration}, folder / "common.pt")
    write_json(folder / "metadata.json", _BACKENDS)
    with open(folder / ".metadata", "wb") as file:
        pickle.dump(metadata, file)


def _entry(key: str, shape: torch.Size, dtype: torch.dtype) -> tuple[TensorStorageMetadata, MetadataIndex]:
    offsets = torch.Size([0] * len(shape))
    properties = TensorProperties.create_from_tensor(torch.empty(0, dtype=dtype))
    return TensorStorageMetadata(properties, shape, [ChunkStorageMetadata(offsets, shape)]), MetadataIndex(
        key, offsets, 0
    )


def _putter(archive: TorchZip) -> Callable[[list[int], Tensor], None]:
    def put(handles: list[int], full: Tensor) -> None:
        archive.write(handles[0], 0, full)
        archive.finish(handles[0])

    return put


def _finisher(fixed: list[int]) -> Callable[[list[int]], None]:
    def finish(handles: list[int]) -> None:
        for at in fixed:
            write_at(handles[0], _NOTHING, at)

    return finish


def _nothing() -> bytes:
    file = io.BytesIO()
    torch.save([None], file)
    return file.getvalue()


_NOTHING = _nothing()


def _has_places(entry: STORAGE_TYPES) -> TypeGuard[TensorStorageMetadata]:
    return hasattr(entry, "chunks")


class TorchDistSource:
    """An opened torch_dist checkpoint, of a converter or of a training run (optimizer state is ignored)."""

    def __init__(self, folder: Path, config: CheckpointConfig, rules: Sequence[Rule]) -> None:
        self.folder, self.config = Path(folder), config
        self._metadata = read_metadata(self.folder / ".metadata")
        self._places = {(i.fqn, tuple(i.offset or ())): info for i, info in self._metadata.storage_data.items()}
        described = self._metadata.state_dict_metadata.items()
        stored = {key: entry for key, entry in described if _has_places(entry)}
        self._prefix = MODEL_PREFIX if any(key.startswith(MODEL_PREFIX) for key in stored) else ""
        self._tensors = {key: entry for key, entry in stored.items() if self._is_model_key(key)}
        self._check(list(placed_rules(config.architecture, rules)))
        self._check_places()

    def _is_model_key(self, key: str) -> bool:
        ours = key.startswith(self._prefix) if self._prefix else not key.startswith(("optimizer.", "rng_state"))
        return ours and not key.endswith("_extra_state")

    def _check(self, placed: Sequence[Placed]) -> None:
        where = self.folder / ".metadata"
        wanted = {self._prefix + one.dist_key: one for one in placed}
        if missing := sorted(set(wanted) - set(self._tensors)):
            raise CheckpointError(
                f"{where} lacks {counted(len(missing), 'tensor')}, first {missing[0]}; layers must be stored one by one "
                "(non-homogeneous), not stacked"
            )
        if left_over := sorted(set(self._tensors) - set(wanted)):
            raise CheckpointError(f"{where} holds {left_over[0]} ({len(left_over)} such), unknown to this architecture")
        for key, one in wanted.items():
            stored, shape = tuple(self._tensors[key].size), one.rule.full_shape(self.config.architecture)
            padded = one.rule.cut == "vocab_parallel" and stored[1:] == shape[1:] and stored[0] >= shape[0]
            if stored != shape and not padded:
                raise CheckpointError(f"{where}: {key} is {list(stored)}, config.json has {list(shape)}")

    def _check_places(self) -> None:
        """Raise CheckpointError unless every part of a tensor has a place in a file that is long enough, with a plausible size."""
        sizes: dict[str, int] = {}
        for key, entry in self._tensors.items():
            for chunk in entry.chunks:
                info = self._places.get((key, tuple(chunk.offsets)))
                if info is None:
                    raise CheckpointError(
                        f"{self.folder / '.metadata'} has no location for {key}; convert or save again"
                    )
                path = self.folder / info.relative_path
                if info.relative_path not in sizes:
                    if not path.is_file():
                        raise CheckpointError(
                            f"{path} is missing; restore it, or read another iteration with --iteration"
                        )
                    sizes[info.relative_path] = path.stat().st_size
                needed = chunk.sizes.numel() * entry.properties.dtype.itemsize
                if not needed <= info.length <= needed + _ENVELOPE:
                    raise CheckpointError(
                        f"{self.folder / '.metadata'}: {key} needs {needed} bytes, but {info.length} are recorded; restore it"
                    )
                if info.offset + info.length > sizes[info.relative_path]:
                    raise CheckpointError(
                        f"{path} is cut short: {info.offset + info.length} bytes needed; restore it, or read another iteration"
                    )

    def full(self, placed: Placed) -> Tensor:
        """Return the whole tensor, joined from its slices, without padding rows."""
        key = self._prefix + placed.dist_key
        entry = self._tensors[key]
        tensor = torch.empty(entry.size, dtype=entry.properties.dtype)
        covered = 0
        for chunk in entry.chunks:
            box = tuple(slice(o, o + s) for o, s in zip(chunk.offsets, chunk.sizes, strict=True))
            tensor[box] = self._read(self._places[key, tuple(chunk.offsets)], tuple(chunk.sizes))
            covered += chunk.sizes.numel()
        if covered != tensor.numel():
            raise CheckpointError(f"{self.folder / '.metadata'}: the parts of {key} do not cover it; save it again")
        return tensor[: self.config.architecture.vocab_size] if placed.rule.cut == "vocab_parallel" else tensor

    def dtype(self, placed: Placed) -> torch.dtype:
        return self._tensors[self._prefix + placed.dist_key].properties.dtype

    def _read(self, info: _StorageInfo, shape: tuple[int, ...]) -> Tensor:
        path = self.folder / info.relative_path
        try:
            tensor = torch.load(file_slice(path, info.offset, info.length), map_location="cpu", weights_only=True)
        except (RuntimeError, EOFError, ValueError, KeyError, pickle.UnpicklingError) as error:
            raise CheckpointError(
                f"{path} is damaged at byte {info.offset}; restore it, or read another iteration"
            ) from error
        if not isinstance(tensor, Tensor) or tuple(tensor.shape) != shape:
            raise CheckpointError(
                f"{path}: the content at byte {info.offset} does not match .metadata; restore the file"
            )
        return tensor
