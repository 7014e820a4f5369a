"""megatron-core's torch_dist format, written and read without a process group and without megatron-core.

It is torch.distributed.checkpoint's format (.metadata says which bytes of which .distcp file hold which box of which
tensor) plus megatron-core's metadata.json and common.pt. Keys are those of GPTModel.sharded_state_dict(prefix="model.")
with per-layer ("non-homogeneous") names and global layer numbers. A tensor is stored whole, the vocabulary without
padding rows: megatron-core fills the rows that a layout adds with zeros, so one checkpoint serves every TP and PP size.

Source of the layout: torch/distributed/checkpoint/{metadata,filesystem}.py and megatron/core/dist_checkpointing.
"""

from __future__ import annotations

import pickle
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

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

from checkpoints_conversion.restricted import file_slice, read_metadata
from megatron_ft.errors import CheckpointError
from megatron_ft.files import write_json
from megatron_ft.models.checkpoint_layout import MODEL_PREFIX, CheckpointConfig
from megatron_ft.models.weights import Placed, Rule, placed_rules

MAX_FILE_BYTES = 5 * 10**9
_BACKENDS = {
    "sharded_backend": "torch_dist",
    "sharded_backend_version": 1,
    "common_backend": "torch",
    "common_backend_version": 1,
}


def write_torch_dist(
    folder: Path,
    placed: Iterable[Placed],
    full: Callable[[Placed], Tensor],
    max_file_bytes: int = MAX_FILE_BYTES,
) -> int:
    """Write all tensors under `folder`. Returns the number of .distcp files. Memory: one whole tensor."""
    entries: dict[str, STORAGE_TYPES] = {}
    places: dict[MetadataIndex, _StorageInfo] = {}
    waiting = list(reversed(list(placed)))
    files = 0
    while waiting:
        name = f"__{files}_0.distcp"
        files += 1
        with open(folder / name, "wb") as file:
            while waiting and file.tell() < max_file_bytes:
                for index, entry, value in _items(waiting.pop(), full):
                    start = file.tell()
                    torch.save(value, file)
                    entries[index.fqn] = entry
                    places[index] = _StorageInfo(name, start, file.tell() - start)
    torch.save({"checkpoint_version": 3.0, "iteration": 0}, folder / "common.pt")
    write_json(folder / "metadata.json", _BACKENDS)
    with open(folder / ".metadata", "wb") as file:  # last, as torch does it: where it is, the rest is there
        pickle.dump(Metadata(entries, storage_data=places, version=CURRENT_DCP_VERSION), file)
    return files


def _items(placed: Placed, full: Callable[[Placed], Tensor]) -> Iterator[tuple[MetadataIndex, STORAGE_TYPES, Any]]:
    """What is stored for one rule: the tensor, and beside a layer's linear the empty state megatron-core looks for."""
    key, tensor = MODEL_PREFIX + placed.dist_key, _owned(full(placed))
    offsets = torch.Size([0] * tensor.dim())
    chunk = ChunkStorageMetadata(offsets, tensor.size())
    properties = TensorProperties.create_from_tensor(tensor)
    yield MetadataIndex(key, offsets, 0), TensorStorageMetadata(properties, tensor.size(), [chunk]), tensor
    if placed.rule.stage == "layer" and placed.rule.cut != "replicated" and key.endswith(".weight"):
        # Transformer Engine keeps its fp8 scales there; without them a plain load of megatron-core's stops.
        extra = key.removesuffix("weight") + "_extra_state/shard_0_1"
        yield MetadataIndex(extra), BytesStorageMetadata(), [None]


def _owned(tensor: Tensor) -> Tensor:
    """torch.save of a view would store the whole tensor behind it."""
    tensor = tensor.contiguous()
    own = tensor.untyped_storage().nbytes() == tensor.numel() * tensor.element_size()
    return tensor if own else tensor.clone()


class TorchDistSource:
    """An opened torch_dist checkpoint: ours, or one saved while training (optimizer state is ignored)."""

    def __init__(self, folder: Path, config: CheckpointConfig, rules: Sequence[Rule]) -> None:
        self.folder, self.config = Path(folder), config
        self._metadata = read_metadata(self.folder / ".metadata")
        self._places = {(i.fqn, tuple(i.offset or ())): info for i, info in self._metadata.storage_data.items()}
        stored = {key: entry for key, entry in self._metadata.state_dict_metadata.items() if hasattr(entry, "chunks")}
        self._prefix = MODEL_PREFIX if any(key.startswith(MODEL_PREFIX) for key in stored) else ""
        self._tensors = {key: entry for key, entry in stored.items() if self._is_model_key(key)}
        self._check(list(placed_rules(config.architecture, rules)))

    def _is_model_key(self, key: str) -> bool:
        ours = key.startswith(self._prefix) if self._prefix else not key.startswith(("optimizer.", "rng_state"))
        return ours and not key.endswith("_extra_state")

    def _check(self, placed: Sequence[Placed]) -> None:
        where = self.folder / ".metadata"
        wanted = {self._prefix + one.dist_key: one for one in placed}
        if missing := sorted(set(wanted) - set(self._tensors)):
            raise CheckpointError(
                f"{where} lacks {len(missing)} tensors, first {missing[0]}; layers must be stored one by one "
                "(non-homogeneous), not stacked"
            )
        if left_over := sorted(set(self._tensors) - set(wanted)):
            raise CheckpointError(f"{where} holds {left_over[0]} ({len(left_over)} such), unknown to this architecture")
        for key, one in wanted.items():
            stored, shape = tuple(self._tensors[key].size), one.rule.full_shape(self.config.architecture)
            padded = one.rule.cut == "vocab_rows" and stored[1:] == shape[1:] and stored[0] >= shape[0]
            if stored != shape and not padded:
                raise CheckpointError(f"{where}: {key} is {list(stored)}, config.json says {list(shape)}")

    def full(self, placed: Placed) -> Tensor:
        """The whole tensor put together from its boxes, padding rows dropped."""
        key = self._prefix + placed.dist_key
        entry = self._tensors[key]
        tensor = torch.empty(entry.size, dtype=entry.properties.dtype)
        covered = 0
        for chunk in entry.chunks:
            box = tuple(slice(o, o + s) for o, s in zip(chunk.offsets, chunk.sizes, strict=True))
            info = self._places.get((key, tuple(chunk.offsets)))
            if info is None:
                raise CheckpointError(
                    f"{self.folder / '.metadata'} does not say where {key} lies; convert or save again"
                )
            tensor[box] = self._read(info, tuple(chunk.sizes))
            covered += chunk.sizes.numel()
        if covered != tensor.numel():
            raise CheckpointError(f"{self.folder / '.metadata'}: the parts of {key} do not cover it; save it again")
        return tensor[: self.config.architecture.vocab_size] if placed.rule.cut == "vocab_rows" else tensor

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
                f"{path}: what lies at byte {info.offset} is not what .metadata says; restore the file"
            )
        return tensor
