"""Training state to and from disk: weights, optimizer, schedule, random streams, data position.

A checkpoint is written under a temporary name by all ranks together and renamed by one; only then does the tracker name it. So a
run killed while it saves leaves the previous checkpoint as it was. Format: megatron-core's torch_dist with per-layer keys, which
loads into any layout; weights are also read from the classic mp_rank folders, in the layout they were written for.
"""

from __future__ import annotations

import contextlib
import dataclasses
import shutil
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from megatron.core import dist_checkpointing, parallel_state, tensor_parallel
from megatron.core.dist_checkpointing import ShardedTensor

from megatron_ft import device
from megatron_ft.errors import CheckpointError
from megatron_ft.files import atomic_folder
from megatron_ft.log import logger
from megatron_ft.models.architecture import padded_vocab_size
from megatron_ft.models.checkpoint_layout import (
    MODEL_PREFIX,
    TOKENIZER_FOLDER,
    CheckpointConfig,
    iteration_folder,
    missing_files,
    rank_file,
    read_config,
    write_config,
    write_tracker,
)
from megatron_ft.parallel import Layout, seed_everything

log = logger("checkpoint")


@dataclass(frozen=True)
class Progress:
    """Where a run stands: optimizer steps done and rows consumed."""

    iteration: int = 0
    consumed_samples: int = 0


def _metadata() -> dict[str, Any]:
    """How the engine lays sharded state out: one key a layer, optimizer state in the shape of its parameter."""
    return {
        "distrib_optim_sharding_type": "fully_reshardable",
        "non_homogeneous_layers": True,
        "chained_optim_avoid_prefix": True,
        "dp_cp_group": parallel_state.get_data_parallel_group(with_context_parallel=True),
    }


def save(root: Path, source: Path, config: CheckpointConfig, model, optimizer, schedule, progress: Progress, layout: Layout) -> Path:
    """Write ROOT/iter_NNNNNNN and point the tracker at it. All ranks call it; returns the folder.

    source: the checkpoint the run began from, whose tokenizer files travel along.
    """
    folder = iteration_folder(root, progress.iteration)
    own = dataclasses.replace(
        config, ckpt_format="torch_dist", iteration=progress.iteration,
        tensor_model_parallel_size=layout.tp_size, pipeline_model_parallel_size=layout.pp_size,
        padded_vocab_size=padded_vocab_size(config.architecture.vocab_size, layout.tp_size),
        dtype="bf16" if model.config.bf16 else "fp32",
    )  # fmt: skip
    weights = model.sharded_state_dict(prefix=MODEL_PREFIX, metadata=_metadata())
    state = {
        "model": weights,
        "optimizer": optimizer.sharded_state_dict(weights, metadata=_metadata()),
        "schedule": schedule.state_dict(),
        "progress": dataclasses.asdict(progress),
        "sizes": [layout.tp_size, layout.pp_size, layout.dp_size],
        "rng": _rng_tensors(layout),
    }
    with _shared_folder(folder, layout) as temporary:
        dist_checkpointing.save(state, str(temporary))
        if layout.is_main:
            write_config(temporary, own)
            if (source / TOKENIZER_FOLDER).is_dir():
                shutil.copytree(source / TOKENIZER_FOLDER, temporary / TOKENIZER_FOLDER)
    if layout.is_main:
        write_tracker(root, progress.iteration)
    dist.barrier()
    return folder


@contextlib.contextmanager
def _shared_folder(target: Path, layout: Layout):
    """atomic_folder for all ranks: made and renamed by the main rank, its temporary name known to every one."""
    with contextlib.ExitStack() as stack:
        name = [str(stack.enter_context(atomic_folder(target, overwrite=True))) if layout.is_main else None]
        dist.broadcast_object_list(name, src=0)
        yield Path(name[0])
        dist.barrier()


def _rng_tensors(layout: Layout) -> dict[str, ShardedTensor]:
    """Every random stream of this rank as bytes: one row of a [world size, bytes] tensor a stream."""
    streams = {**device.rng_state(), **tensor_parallel.get_cuda_rng_tracker().get_states()}
    rows = ((0, layout.rank, layout.world_size),)
    return {
        name: ShardedTensor.from_rank_offsets(f"rng.{name}", state.cpu()[None].clone(), *rows, replica_id=0)
        for name, state in streams.items()
    }


def describe(folder: Path) -> CheckpointConfig:
    """What a checkpoint says of itself. Raises CheckpointError when files that it promises are missing."""
    config = read_config(folder)
    gone = missing_files(folder)
    if gone:
        raise CheckpointError(
            f"{gone[0]} is missing ({len(gone)} file(s) in all): the checkpoint is incomplete; copy or convert it again"
        )
    return config


def load_weights(folder: Path, config: CheckpointConfig, model, layout: Layout) -> None:
    """Fill a bare or wrapped model's weights from either format."""
    if config.ckpt_format == "torch":
        _load_classic(folder, config, model, layout)
    else:
        state = _engine_load({"model": model.sharded_state_dict(prefix=MODEL_PREFIX, metadata=_metadata())}, folder)
        _fill(model, _without_prefix(state["model"]), folder)


def _load_classic(folder: Path, config: CheckpointConfig, model, layout: Layout) -> None:
    written = (config.tensor_model_parallel_size, config.pipeline_model_parallel_size)
    if written != (layout.tp_size, layout.pp_size):
        raise CheckpointError(
            f"{folder} is in the classic format for TP{written[0]} x PP{written[1]}, this run is TP{layout.tp_size} x PP{layout.pp_size}: "
            f"run with the checkpoint's sizes, or convert with --ckpt_format torch_dist, which loads into any layout"
        )
    path = rank_file(folder, layout.tp_rank, layout.pp_rank, layout.tp_size, layout.pp_size)
    try:
        weights = torch.load(path, map_location="cpu", weights_only=True, mmap=True)["model"]
    except Exception as error:  # noqa: BLE001 - torch raises many kinds for a damaged file
        raise _unreadable(path, error) from error
    _fill(model, weights, path)


def _fill(model, weights: dict, where: Path) -> None:
    try:
        missing, unexpected = model.load_state_dict(weights, strict=False)
    except RuntimeError as error:
        raise CheckpointError(f"{where}: does not fit the model that its config.json describes ({_first_line(error)})") from error
    missing = [key for key in missing if not key.endswith("_extra_state")]
    if missing or unexpected:
        raise CheckpointError(
            f"{where}: tensors missing: {', '.join(missing[:3]) or 'none'}; not known: {', '.join(unexpected[:3]) or 'none'}; convert again"
        )


def resume(folder: Path, model, optimizer, schedule, layout: Layout, seed: int) -> Progress:
    """Continue exactly where `folder` was saved: weights, optimizer, schedule, position; on the same layout also the random streams."""
    common = _guarded(lambda: dist_checkpointing.load_common_state_dict(str(folder)), folder)
    if "progress" not in common:
        raise CheckpointError(f"{folder}: holds weights only, no training state to resume: start from it with --finetune")
    weights = model.sharded_state_dict(prefix=MODEL_PREFIX, metadata=_metadata())
    state = {"model": weights, "optimizer": optimizer.sharded_state_dict(weights, is_loading=True, metadata=_metadata())}
    same_layout = common["sizes"] == [layout.tp_size, layout.pp_size, layout.dp_size]
    if same_layout:
        state["rng"] = _rng_tensors(layout)
    state = _engine_load(state, folder)
    _fill(model, _without_prefix(state["model"]), folder)
    optimizer.load_state_dict(state["optimizer"])
    schedule.load_state_dict(state["schedule"])
    progress = Progress(**state["progress"])
    if same_layout:
        _restore_rng(state["rng"])
    else:
        seed_everything(seed + progress.iteration, layout)
        log.info(f"layout differs from the checkpoint's (TP, PP, DP = {common['sizes']}): random streams start anew")
    return progress


def _restore_rng(streams: dict[str, torch.Tensor]) -> None:
    states = {name: row[0] for name, row in streams.items()}
    device.set_rng_state(states)
    tracker = tensor_parallel.get_cuda_rng_tracker()
    tracker.set_states({name: states[name] for name in tracker.get_states()})


def _engine_load(state: dict, folder: Path) -> dict:
    return _guarded(lambda: dist_checkpointing.load(state, str(folder)), folder)


def _guarded(read, folder: Path):
    """The engine raises whatever its file readers raise; a user wants to know which checkpoint and what to do."""
    try:
        return read()
    except Exception as error:  # noqa: BLE001
        raise _unreadable(folder, error) from error


def _unreadable(path: Path, error: Exception) -> CheckpointError:
    return CheckpointError(
        f"{path}: cannot be read ({type(error).__name__}: {_first_line(error)}): it is damaged or cut short; "
        f"use an earlier checkpoint (--iteration, or an iter_ folder in --load) or convert again"
    )


def _first_line(error: Exception) -> str:
    lines = str(error).strip().splitlines()
    return lines[-1][:160] if lines else ""


def _without_prefix(weights: dict) -> dict:
    return {key.removeprefix(MODEL_PREFIX): value for key, value in weights.items()}
