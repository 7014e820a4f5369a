"""Training state to and from disk: weights, optimizer, schedule, random streams, data position.

A checkpoint is written under a temporary name by all ranks together and renamed by one; only then does the tracker name it. So a
run killed while it saves leaves the previous checkpoint as it was. Format: megatron-core's torch_dist with per-layer keys, which
loads into any layout. Weights alone are models/load.py's business.
"""

from __future__ import annotations

import contextlib
import dataclasses
import shutil
from dataclasses import dataclass
from pathlib import Path

import torch
import torch.distributed as dist
from megatron.core import dist_checkpointing, tensor_parallel
from megatron.core.dist_checkpointing import ShardedTensor

from megatron_ft import device
from megatron_ft.files import atomic_folder
from megatron_ft.log import logger
from megatron_ft.models.checkpoint_layout import (
    TOKENIZER_FOLDER,
    CheckpointConfig,
    find_checkpoint,
    iteration_folder,
    no_training_state,
    write_config,
    write_tracker,
)
from megatron_ft.models.load import chunks_of, engine_load, fill_chunks, guarded, sharded_weights, sharding_metadata
from megatron_ft.parallel import Layout, seed_everything

log = logger("checkpoint")


@dataclass(frozen=True)
class Progress:
    """Where a run stands: optimizer steps done and rows consumed."""

    iteration: int = 0
    consumed_samples: int = 0


def save(
    root: Path, source: Path, config: CheckpointConfig, model, optimizer, schedule, progress: Progress, layout: Layout,
    texts: dict[str, str] | None = None,
) -> Path:  # fmt: skip
    """Write ROOT/iter_NNNNNNN and point the tracker at it. All ranks call it; returns the folder.

    model: bare, or the list of a stage's chunks. source: the checkpoint the run began from, whose tokenizer files travel along.
    texts: more files, name -> content.
    """
    folder, engine = iteration_folder(root, progress.iteration), chunks_of(model)[0].config
    own = dataclasses.replace(
        config, ckpt_format="torch_dist", iteration=progress.iteration,
        tensor_model_parallel_size=layout.tp_size, pipeline_model_parallel_size=layout.pp_size,
        padded_vocab_size=chunks_of(model)[0].vocab_size,
        dtype="bf16" if engine.bf16 else "fp16" if engine.fp16 else "fp32",
    )  # fmt: skip
    weights = sharded_weights(model)
    streams = _rng_tensors(layout)
    state = {
        "model": weights,
        "optimizer": optimizer.sharded_state_dict(weights, metadata=sharding_metadata()),
        "schedule": schedule.state_dict(),
        "progress": dataclasses.asdict(progress),
        "sizes": [layout.tp_size, layout.pp_size, layout.dp_size],
        "streams": sorted(streams),
        "rng": streams,
    }
    with _shared_folder(folder, layout) as temporary:
        dist_checkpointing.save(state, str(temporary))
        if layout.is_main:
            write_config(temporary, own)
            for name, text in (texts or {}).items():
                (temporary / name).write_text(text, encoding="utf-8")
            if (source / TOKENIZER_FOLDER).is_dir():
                shutil.copytree(source / TOKENIZER_FOLDER, temporary / TOKENIZER_FOLDER)
    if layout.is_main:
        write_tracker(root, progress.iteration)
    dist.barrier()
    return folder


def prune(root: Path, keep: int, layout: Layout) -> None:
    """Delete all but the newest `keep` training checkpoints under root, never the one the tracker names nor converted weights."""
    if layout.is_main:
        kept_for_tracker = find_checkpoint(root)
        folders = sorted(path for path in root.glob("iter_*") if path.is_dir())
        for folder in folders[:-keep]:
            if folder != kept_for_tracker:
                shutil.rmtree(folder)
    dist.barrier()


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


def resume(folder: Path, model, optimizer, schedule, layout: Layout, seed: int) -> Progress:
    """Continue exactly where `folder` was saved: weights, optimizer, schedule, position; on the same layout also the random streams.

    Learning rates, betas and epsilon are the flags' of this run, not those that were saved.
    """
    common = guarded(lambda: dist_checkpointing.load_common_state_dict(str(folder)), folder)
    if "progress" not in common:
        raise no_training_state(folder)
    weights = sharded_weights(model)
    state = {
        "model": weights,
        "optimizer": optimizer.sharded_state_dict(weights, is_loading=True, metadata=sharding_metadata()),
    }
    streams = _rng_tensors(layout)
    same_layout = common["sizes"] == [layout.tp_size, layout.pp_size, layout.dp_size]
    same_device = common.get("streams", sorted(streams)) == sorted(streams)  # a GPU has a stream more than a CPU
    if same_layout and same_device:
        state["rng"] = streams
    state = engine_load(state, folder)
    fill_chunks(model, state["model"], folder)
    flags = {name: optimizer.param_groups[0][name] for name in ("max_lr", "min_lr", "betas", "eps")}
    optimizer.load_state_dict(state["optimizer"])
    for group in optimizer.param_groups:
        group.update(flags)
    schedule.load_state_dict(state["schedule"])
    progress = Progress(**state["progress"])
    if "rng" in state:
        _restore_rng(state["rng"])
    else:
        seed_everything(seed + progress.iteration, layout)
        before = "on another kind of device" if same_layout else f"with TP, PP, DP = {common['sizes']}"
        log.info(f"the checkpoint was saved {before}: random streams start anew")
    return progress


def _restore_rng(streams: dict[str, torch.Tensor]) -> None:
    states = {name: row[0] for name, row in streams.items()}
    device.set_rng_state(states)
    tracker = tensor_parallel.get_cuda_rng_tracker()
    tracker.set_states({name: states[name] for name in tracker.get_states()})
