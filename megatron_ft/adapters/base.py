"""The model that adapters belong to: its weights, loaded without touching the adapters, and their hash, by which another one is refused."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch.distributed as dist
from megatron.core.dist_checkpointing.dict_utils import nested_values
from megatron.core.dist_checkpointing.mapping import ShardedTensor, ShardedTensorFactory, is_main_replica

from megatron_ft.adapters.spec import BASE
from megatron_ft.checkpoints.folder import MODEL_PREFIX, CheckpointConfig
from megatron_ft.checkpoints.load import load_weights, sharded_weights
from megatron_ft.engine.parallel import Layout
from megatron_ft.errors import CheckpointError
from megatron_ft.log import logger
from megatron_ft.models.architecture import Architecture
from megatron_ft.models.dtypes import torch_dtype
from megatron_ft.models.fingerprint import digest, sums
from megatron_ft.quantization.frozen import FrozenLinear, freeze_linears, frozen_linears

log = logger("adapters")


def load_base(
    folder: Path, config: CheckpointConfig, chunks: list, layout: Layout, recorded: Any = None, nf4: bool = False
) -> dict[str, str]:
    """Fill all weights but the adapters' from a verified checkpoint, and return their hashes. All ranks call it.

    recorded: the hashes of the weights that the adapters were trained with, if any. Raise CheckpointError if these are others.
    nf4: then quantise the linears. The hashes are those of the weights before.
    """
    load_weights(folder, config, chunks, layout, verified=True, only=BASE)
    found = weight_hashes(chunks, config.architecture)
    if recorded is not None:
        check_base(recorded, found, folder)
    if nf4:
        freeze(chunks, config.dtype)
    return found


def freeze(chunks: list, dtype: str) -> None:
    """Quantise the linears of a loaded model, with the values of a checkpoint of it in this type that is quantised."""
    for chunk in chunks:
        freeze_linears(chunk, torch_dtype(dtype))


def weight_hashes(chunks: list, arch: Architecture) -> dict[str, str]:
    """Return a hash of all weights but the adapters', by type of the numbers; of quantised linears as dequantised. All ranks call it and
    get the same.
    """
    mine: dict[tuple[str, str], int] = {}
    for part in _main_parts(chunks):
        for kind, total in _own_sums(part, arch).items():
            place = (kind, part.key.removeprefix(MODEL_PREFIX))
            mine[place] = mine.get(place, 0) + total
    everyone: list[Any] = [None] * dist.get_world_size()
    dist.all_gather_object(everyone, mine)
    return together(everyone)


def together(parts: list[dict[tuple[str, str], int]]) -> dict[str, str]:
    """Return the hash of a model from sums by (type, tensor) of its parts, by type."""
    totals: dict[str, dict[str, int]] = {}
    for part in parts:
        for (kind, name), total in part.items():
            of_kind = totals.setdefault(kind, {})
            of_kind[name] = of_kind.get(name, 0) + total
    return {kind: digest(tensors) for kind, tensors in sorted(totals.items())}


def _main_parts(chunks: list) -> list[ShardedTensor]:
    """Return the parts of tensors that no other rank counts."""
    found: list[ShardedTensor] = []
    linears = [linear for chunk in chunks for linear in frozen_linears(chunk).values()]
    by_codes, scales = {id(one.weight): one for one in linears}, {id(one.weight_absmax) for one in linears}
    for entry in nested_values(sharded_weights(chunks if len(chunks) > 1 else chunks[0], BASE)):
        data = id(getattr(entry, "data", None))
        if data in scales:
            continue
        if data in by_codes:
            entry = _dequantised(entry, by_codes[data])
        if isinstance(entry, ShardedTensorFactory):
            found += nested_values(entry.build())
        elif isinstance(entry, ShardedTensor):
            found.append(entry)
    return [part for part in found if is_main_replica(part.replica_id)]


def _dequantised(entry: Any, linear: FrozenLinear) -> Any:
    """Return the engine's description of codes as that of the weight, which has twice as many columns."""
    dense = linear.dense(linear.weight, linear.weight_absmax, linear.config.params_dtype)
    if isinstance(entry, ShardedTensorFactory):
        return replace(entry, data=dense)
    wide = {
        name: (*getattr(entry, name)[:-1], 2 * getattr(entry, name)[-1])
        for name in ("local_shape", "global_shape", "global_offset")
    }
    return replace(entry, data=dense, dtype=dense.dtype, **wide)


def _own_sums(part: ShardedTensor, arch: Architecture) -> dict[str, int]:
    first, *others = part.global_offset[part.prepend_axis_num :]
    data = part.data.reshape(part.local_shape)
    if part.key.endswith(("embedding.word_embeddings.weight", "output_layer.weight")):  # padded, by layout
        data = data[: max(0, arch.vocab_size - first)]
    return sums(data, first, others[0] if others else 0)


def check_base(recorded: Any, found: Mapping[str, str], where: Path) -> None:
    """Raise CheckpointError if the weights in `where` are not those that adapters were trained with.

    recorded: as an adapter's config.json has it, hash by type. Without a common type they cannot be compared, which is logged.
    """
    if not isinstance(recorded, dict):
        raise CheckpointError("the entry adapter of config.json has no hashes of the base; use another checkpoint")
    common = recorded.keys() & found.keys()
    if not common:
        log.warning(
            f"the adapters were trained with {', '.join(recorded)} weights, this run computes in {', '.join(found)}: whether "
            f"{where} is their base is not checked"
        )
    for kind in common:
        if recorded[kind] != found[kind]:
            raise CheckpointError(
                f"{where} is not the model that the adapters were trained with: its weights have the hash {found[kind][:12]}, those "
                f"had {str(recorded[kind])[:12]}; give the right one with --base"
            )
