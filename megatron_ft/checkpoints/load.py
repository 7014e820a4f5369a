"""Loads the weights of a checkpoint in either format into a built model.

torch_dist (megatron-core's) loads into any layout; the classic mp_rank folders into the layout they were written for. Errors of the
engine's and torch's readers for a damaged file become a CheckpointError with the checkpoint and the remedy.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any, TypeVar

import torch
from megatron.core import dist_checkpointing, parallel_state
from torch.distributed.checkpoint.api import CheckpointException

from megatron_ft.checkpoints.folder import MODEL_PREFIX, CheckpointConfig, check_sizes, rank_file
from megatron_ft.checkpoints.quantised import ask_for_stored, check_held, expand
from megatron_ft.checkpoints.verify import check_tensors, read_description, verify
from megatron_ft.engine.parallel import Layout
from megatron_ft.errors import CheckpointError
from megatron_ft.models.trainable import ALL, Trainable, global_name

Result = TypeVar("Result")


def sharding_metadata() -> dict[str, Any]:
    """Return the engine's layout of sharded state: one key per layer, optimizer state in the shape of its parameter."""
    return {
        "distrib_optim_sharding_type": "fully_reshardable",
        "non_homogeneous_layers": True,
        "chained_optim_avoid_prefix": True,
        "dp_cp_group": parallel_state.get_data_parallel_group(with_context_parallel=True),
    }


def load_weights(
    folder: Path, config: CheckpointConfig, model: Any, layout: Layout, verified: bool = False, only: Trainable = ALL
) -> None:
    """Fill weights from either format. model: bare or wrapped, or the list of a stage's chunks.

    verified: the caller has called verify.verify; else all ranks do so here. only: parameters that the checkpoint has.
    Raise CheckpointError for what is damaged or of another model.
    """
    if not verified:
        verify(folder, config, layout)
    for chunk in chunks_of(model):
        check_held(folder, config, _inside(chunk))
    if config.ckpt_format == "torch":
        (chunk,) = chunks_of(model)  # check_sizes refuses other splits
        _load_classic(folder, config, chunk, layout, only)
    else:
        wanted = {"model": sharded_weights(model, only)}
        for chunk, weights in _by_chunk(model, wanted["model"]):
            ask_for_stored(weights, chunk, config)
        check_tensors(read_description(folder).metadata, wanted, folder, cast_weights=True)
        state = engine_load(wanted, folder)
        for chunk, weights in _by_chunk(model, state.get("model", {})):
            expand(weights, chunk, config, layout)
        fill_chunks(model, state.get("model", {}), folder, only)


def _load_classic(folder: Path, config: CheckpointConfig, model: Any, layout: Layout, only: Trainable) -> None:
    check_sizes(folder, config, layout.tp_size, layout.pp_size)
    path = rank_file(folder, layout.tp_rank, layout.pp_rank, layout.tp_size, layout.pp_size)
    try:
        weights = torch.load(path, map_location="cpu", weights_only=True, mmap=True)["model"]
    except Exception as error:
        raise _unreadable(path, error) from error
    expand(weights, _inside(model), config, layout)
    fill(model, weights, path, only)
    torch.distributed.barrier()  # a rank whose file is damaged stops the others here, before anything is written


def _by_chunk(model: Any, weights: dict) -> list[tuple[Any, dict]]:
    """Return (bare chunk, its part of what `sharded_weights` describes) of a stage."""
    chunks = [_inside(chunk) for chunk in chunks_of(model)]
    parts = [weights] if len(chunks) == 1 else [weights[f"chunk{number}"] for number in range(len(chunks))]
    return list(zip(chunks, parts, strict=True))


def _inside(model: Any) -> Any:
    while hasattr(model, "module"):
        model = model.module
    return model


def sharded_weights(model: Any, only: Trainable = ALL) -> dict:
    """Return the engine's description of this rank's weights within the whole model; of several chunks, a dictionary for each.

    only: parameters that are saved or loaded; the others are left out.
    """
    chunks = chunks_of(model)
    each = [_described(chunk, only) for chunk in chunks]
    return each[0] if len(each) == 1 else {f"chunk{number}": weights for number, weights in enumerate(each)}


def _described(chunk: Any, only: Trainable) -> dict:
    found = chunk.sharded_state_dict(prefix=MODEL_PREFIX, metadata=sharding_metadata())
    return {key: entry for key, entry in found.items() if global_name(chunk, key.removeprefix(MODEL_PREFIX)) in only}


def chunks_of(model: Any) -> list:
    """Return a model as the list of the chunks of its stage; most stages have one."""
    return model if isinstance(model, list) else [model]


def fill_chunks(model: Any, weights: dict, where: Path, only: Trainable = ALL) -> None:
    """Call `fill` for the tensors that `sharded_weights` describes."""
    chunks = chunks_of(model)
    for number, chunk in enumerate(chunks):
        fill(chunk, weights if len(chunks) == 1 else weights.get(f"chunk{number}", {}), where, only)


def fill(model: Any, weights: dict, where: Path, only: Trainable = ALL) -> None:
    """Put loaded weights (with or without our key prefix) into a model.

    only: parameters that have to be there. Raise CheckpointError unless all of them fit and none is left over.
    """
    weights = {key.removeprefix(MODEL_PREFIX): value for key, value in weights.items()}
    try:
        missing, unexpected = model.load_state_dict(weights, strict=False)
    except RuntimeError as error:
        raise CheckpointError(
            f"{where}: does not fit the model that its config.json describes ({_first_line(error)})"
        ) from error
    missing = [key for key in missing if not key.endswith("_extra_state") and global_name(model, key) in only]
    if missing or unexpected:
        raise CheckpointError(
            f"{where}: tensors missing: {', '.join(missing[:3]) or 'none'}; not known: {', '.join(unexpected[:3]) or 'none'}; convert again"
        )


def engine_load(state: dict, folder: Path) -> dict:
    return guarded(lambda: dist_checkpointing.load(state, str(folder)), folder)


def guarded(read: Callable[[], Result], folder: Path) -> Result:
    """Convert errors of the engine's file readers to a CheckpointError with the checkpoint and the remedy."""
    try:
        return read()
    except CheckpointException as error:  # of torch, not an Exception; it has the error of each failing rank
        _, first = min(error.failures.items())
        raise _unreadable(folder, first[0]) from error
    except Exception as error:
        raise _unreadable(folder, error) from error


def _unreadable(path: Path, error: BaseException) -> CheckpointError:
    return CheckpointError(
        f"{path}: cannot be read ({type(error).__name__}: {_first_line(error)}): it is damaged or cut short; "
        f"use an earlier checkpoint (--iteration, or an iter_ folder in --load) or convert again"
    )


def _first_line(error: BaseException) -> str:
    lines = str(error).strip().splitlines()
    return lines[-1][:160] if lines else ""
