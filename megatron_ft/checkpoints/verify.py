"""Verifies a checkpoint before it is loaded: all ranks together, each with a share of the files.

Digests detect damaged or incomplete files. The restricted reader refuses a pickle with other types before the engine reads it, which
unpickles without limits. The tensors must be those of the model. An error that one rank finds is raised on all, with the same message.
"""

from __future__ import annotations

import functools
import pickle
from collections.abc import Iterable
from pathlib import Path
from typing import Any, NamedTuple

import torch
from megatron.core.dist_checkpointing import ShardedTensor
from megatron.core.dist_checkpointing.dict_utils import nested_values
from torch.distributed.checkpoint.metadata import Metadata, TensorStorageMetadata

from megatron_ft.checkpoints.folder import CERTIFICATE, MODEL_PREFIX, CheckpointConfig, rules_in
from megatron_ft.checkpoints.restricted import file_slice, read_metadata
from megatron_ft.digests import check_digests, has_digests, unlisted
from megatron_ft.engine.collective_errors import raise_together, refusal
from megatron_ft.engine.parallel import Layout
from megatron_ft.errors import CheckpointError, DamagedError
from megatron_ft.log import logger
from megatron_ft.models.weights import placed_rules

log = logger("checkpoint")

MAX_METADATA_BYTES = 1 << 30
"""A .metadata is far below: it has a few hundred bytes a tensor."""


def verify(folder: Path, config: CheckpointConfig, layout: Layout, digests: bool = True) -> None:
    """Raise CheckpointError, on every rank the same, unless the files are what was written and name no foreign object.

    digests: compare the content of every file; without it only what could run something is looked at.
    """
    problem = None
    try:
        if digests:
            _check_share(folder, layout)
        if config.ckpt_format == "torch_dist":
            metadata = read_description(folder).metadata
            if config.adapter is None:
                _check_weights(metadata, config, folder)
    except CheckpointError as error:
        problem = error
    except OSError as error:
        problem = refusal(error)
    raise_together(problem)


def _check_share(folder: Path, layout: Layout) -> None:
    if not has_digests(folder):
        if layout.is_main:
            log.warning(
                f"{folder} has no digests (an older version or another tool wrote it): its content is not verified"
            )
        return
    check_digests(folder, (layout.rank, layout.world_size))
    others = [name for name in unlisted(folder) if name != CERTIFICATE] if layout.is_main else []
    if others:
        log.warning(f"{folder} holds {others[0]} ({len(others)} such), which its save did not write: not read")


class Described(NamedTuple):
    """The description of a torch_dist checkpoint: its tensors (.metadata) and its other content (common.pt). Not to be changed."""

    metadata: Metadata
    common: dict[str, Any]


def read_description(folder: Path) -> Described:
    """Read .metadata and common.pt, once as long as the two files stay the same: verifying and loading both ask for them.

    Raise CheckpointError where one is damaged, or names anything but tensors and plain containers.
    """
    folder = Path(folder)
    stats = [(folder / name).stat() for name in (".metadata", "common.pt")]
    if stats[0].st_size > MAX_METADATA_BYTES:
        raise DamagedError(f"{folder}/.metadata has more than {MAX_METADATA_BYTES} bytes: not a checkpoint's")
    return _read_description(
        folder.resolve(), tuple((s.st_ino, s.st_size, s.st_mtime_ns, s.st_ctime_ns) for s in stats)
    )


@functools.lru_cache(maxsize=1)
def _read_description(folder: Path, _files: tuple) -> Described:
    return Described(read_metadata(folder / ".metadata"), read_tensors(folder / "common.pt"))


def read_tensors(path: Path, kind: type | tuple[type, ...] = dict) -> Any:
    """Return what torch.save wrote of tensors and plain containers. Raise CheckpointError where it is damaged or names foreign objects."""
    try:
        found = torch.load(path, map_location="cpu", weights_only=True)
    except pickle.UnpicklingError as error:
        foreign = "Unsupported global" in str(error) or "GLOBAL" in str(error)
        what = "names objects that no checkpoint needs; do not trust it" if foreign else "is damaged or cut short"
        raise DamagedError(f"{path} {what}; use an earlier checkpoint") from error
    except Exception as error:  # a damaged file can raise any exception
        raise DamagedError(
            f"{path} is damaged or cut short ({type(error).__name__}); use an earlier checkpoint"
        ) from error
    if not isinstance(found, kind):
        raise DamagedError(f"{path} is not a checkpoint's; use an earlier checkpoint")
    return found


def _check_weights(metadata: Metadata, config: CheckpointConfig, folder: Path) -> None:
    """Raise CheckpointError unless the weights are those of the model that config.json describes."""
    arch, stored = config.architecture, metadata.state_dict_metadata
    prefix = MODEL_PREFIX if any(key.startswith(MODEL_PREFIX) for key in stored) else ""
    for placed in placed_rules(arch, rules_in(config)):
        entry, shape = stored.get(prefix + placed.dist_key), tuple(placed.rule.full_shape(arch))
        size = tuple(entry.size) if isinstance(entry, TensorStorageMetadata) else None
        padded = placed.rule.cut == "vocab_parallel" and size and size[1:] == shape[1:] and size[0] >= shape[0]
        if size != shape and not padded:
            found = f"is {list(size)}, its config.json says {list(shape)}" if size else "is missing"
            raise CheckpointError(
                f"{folder}: {placed.dist_key} {found}: its tensors are those of another model; use another checkpoint"
            )


def check_tensors(metadata: Metadata, wanted: dict, folder: Path, cast_weights: bool) -> None:
    """Raise CheckpointError unless the checkpoint has every tensor this rank asks for, in its shape and type.

    wanted: a sharded state dict. cast_weights: floating-point weights may be of another type, because the run asks for one.
    """
    for tensor in _tensors(wanted):
        stored = metadata.state_dict_metadata.get(tensor.key)
        if not isinstance(stored, TensorStorageMetadata):
            raise CheckpointError(
                f"{folder} has no tensor {tensor.key}: it is of another model or optimizer than this run's; "
                f"use a checkpoint of this one, or take the weights only with --finetune"
            )
        if not tensor.allow_shape_mismatch and tuple(stored.size) != tuple(tensor.global_shape):
            raise CheckpointError(
                f"{folder}: {tensor.key} is {list(stored.size)}, this run's is {list(tensor.global_shape)}: "
                f"it is of another model; use a checkpoint of this one"
            )
        castable = cast_weights and stored.properties.dtype.is_floating_point and tensor.dtype.is_floating_point
        if stored.properties.dtype != tensor.dtype and not castable:
            raise CheckpointError(
                f"{folder}: {tensor.key} is stored in {_name(stored.properties.dtype)}, this run computes in {_name(tensor.dtype)}: "
                f"resume with the precision it was saved with (--bf16 or not), or take the weights only with --finetune"
            )


def tensor_hashes(folder: Path) -> dict[str, str]:
    """Return name -> hash of type, shape and bits of every tensor of a checkpoint, optimizer and random streams included."""
    if (Path(folder) / ".metadata").is_file():
        found: dict[str, str] = {}
        for index, place in read_metadata(Path(folder) / ".metadata").storage_data.items():
            record = torch.load(
                file_slice(Path(folder) / place.relative_path, place.offset, place.length), weights_only=True
            )
            found |= _hashes(record, f"{index.fqn} {list(index.offset or ())}")
        return found
    files = sorted(Path(folder).glob("mp_rank_*/*.pt"))
    return {
        k: v for path in files for k, v in _hashes(read_tensors(path, (dict, list)), f"{path.parent.name}/").items()
    }


def _hashes(value: Any, name: str) -> dict[str, str]:
    import xxhash

    if isinstance(value, torch.Tensor):
        bits = value.contiguous().reshape(-1).view(torch.uint8).numpy()
        return {name: f"{value.dtype} {list(value.shape)} {xxhash.xxh3_128_hexdigest(bits.data)}"}
    if isinstance(value, dict):
        parts: Iterable[tuple[Any, Any]] = value.items()
    elif isinstance(value, list | tuple):
        parts = enumerate(value)
    else:
        return {}
    return {k: v for key, part in parts for k, v in _hashes(part, f"{name}.{key}").items()}


def _tensors(state: dict) -> Iterable[ShardedTensor]:
    return (value for value in nested_values(state) if isinstance(value, ShardedTensor))


def _name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")
