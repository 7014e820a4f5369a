"""Saves and loads the checkpoint of a run: weights, optimizer, schedule, random streams, data position.

The format is megatron-core's torch_dist with per-layer keys, which loads into any layout; classic.py handles the classic one. saver.py
commits a save; checkpoints/load.py loads only weights.
"""

from __future__ import annotations

import contextlib
import dataclasses
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import partial
from inspect import signature
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from megatron.core import tensor_parallel
from megatron.core.dist_checkpointing import ShardedTensor
from megatron.core.dist_checkpointing.core import CheckpointingConfig, save_config
from megatron.core.dist_checkpointing.state_dict_utils import save_preprocess
from megatron.core.dist_checkpointing.strategies.torch import TorchDistSaveShardedStrategy

from megatron_ft import device
from megatron_ft.checkpoints import classic
from megatron_ft.checkpoints.folder import CONFIG, TOKENIZER_FOLDER, CheckpointConfig, no_training_state, write_config
from megatron_ft.checkpoints.load import chunks_of, engine_load, fill_chunks, sharded_weights
from megatron_ft.checkpoints.owned_state import optimizer_state
from megatron_ft.checkpoints.saver import Keep, Plan, Saver
from megatron_ft.checkpoints.verify import check_tensors, read_description
from megatron_ft.checkpoints.writer import Part, save_tensors
from megatron_ft.config.sections import Checkpointing
from megatron_ft.digests import digest_files, files_below
from megatron_ft.engine.collective_errors import raise_together
from megatron_ft.engine.parallel import Layout, seed_everything
from megatron_ft.engine.versions import check_parts
from megatron_ft.errors import CheckpointError
from megatron_ft.log import logger
from megatron_ft.models.trainable import ALL, Trainable

if TYPE_CHECKING:
    from torch.distributed.checkpoint.metadata import Metadata

log = logger("checkpoint")

_STRATEGIES = "megatron.core.dist_checkpointing.strategies.torch"


@dataclass(frozen=True)
class Progress:
    """The progress of a run: optimizer steps done and rows consumed."""

    iteration: int = 0
    consumed_samples: int = 0
    samples_hash: str = ""
    """Of the rows consumed, in order; see consumed.py."""


@dataclass(frozen=True)
class Contents:
    """The content of a checkpoint. model: the bare chunks of this rank's stage."""

    config: CheckpointConfig
    model: Any
    optimizer: Any
    schedule: Any
    layout: Layout
    texts: dict[str, str]
    """More files, name -> content."""
    tokenizer: dict[str, bytes] = field(default_factory=dict)
    """Its files, name -> content, as read_tokenizer gives them."""
    only: Trainable = ALL
    """The parameters that are saved."""


def read_tokenizer(source: Path, config: CheckpointConfig) -> dict[str, bytes]:
    """Return the tokenizer files of a checkpoint, to save them with the run: the checkpoint may be deleted before.

    Raise CheckpointError if config.json names a tokenizer and there is none.
    """
    folder = source / TOKENIZER_FOLDER
    found = {name: (folder / name).read_bytes() for name in files_below(folder)}
    if config.tokenizer and not found:
        raise CheckpointError(f"{folder} is missing: the checkpoint is incomplete; copy or convert it again")
    return found


def make_saver(contents: Contents, section: Checkpointing) -> contextlib.AbstractContextManager[Saver | None]:
    """Return what saves a run as the flags say; None where they name no place."""
    if not section.save:
        return contextlib.nullcontext()
    keep = Keep(section.keep_last, section.save_retain_interval)
    return Saver(
        Path(section.save), contents.layout, partial(plan_save, contents, section.ckpt_format), section.async_save, keep
    )


class _Planner(TorchDistSaveShardedStrategy):
    """The engine's plan of who writes what, without its way of writing."""

    def _get_save_and_finalize_callbacks(self, writer: Any, planned: Any, async_strategy: str = "") -> tuple[Any, Any]:
        """Return the writer instead of callbacks. async_strategy: passed by megatron-core 0.19; the plan does not depend on it."""
        return writer, planned[1]

    def plan(self, tensors: Any, folder: Path) -> tuple[Any, Any]:
        """Return the engine's writer for this rank, and the metadata. All ranks call it."""
        check_parts("_Planner", f"{_STRATEGIES}:TorchDistSaveShardedStrategy._get_save_and_finalize_callbacks")
        asks = "async_strategy" in signature(self.async_save).parameters
        # The default of 0.19 is the writer of another package, which is not needed here.
        return self.async_save(tensors, folder, **({"async_strategy": "mcore"} if asks else {}))


def plan_save(contents: Contents, ckpt_format: str, folder: Path, progress: Progress) -> Plan:
    """Return what this rank writes into `folder`. All ranks call it."""
    own, layout = contents, contents.layout
    state = {
        "schedule": own.schedule.state_dict(),
        "progress": dataclasses.asdict(progress),
        "sizes": layout.sizes,
    }
    put = small_files(own, progress, ckpt_format) if layout.is_main else {}
    if ckpt_format == "torch":
        return classic.plan_save(state | {"rng": _streams()}, put, own.model, own.optimizer, folder, layout)
    weights, streams = sharded_weights(own.model, own.only), _rng_tensors(layout)
    optimizer = optimizer_state(own.optimizer, weights)
    state |= {"model": weights, "optimizer": optimizer.to_save(), "streams": sorted(streams), "rng": streams}
    return plan_sharded(state, put, folder, layout.is_main, optimizer.has_one_writer_each)


def plan_sharded(
    state: dict[str, Any], put: dict[str, Callable[[Path], Any]], folder: Path, is_main: bool, has_one_writer_each: bool = False
) -> Plan:  # fmt: skip
    """Return the same for a state of the engine's sharded tensors and of objects that are equal on all ranks. put: other files of the main
    rank.

    has_one_writer_each: exactly one rank writes each tensor, by construction. If False, the engine collects the tensors of all ranks on
    every rank to check this. In both cases the main rank finds a part of a tensor that no rank writes, in the plan.
    """
    tensors, common = save_preprocess(state, validate_access_integrity=not has_one_writer_each)
    writer, metadata = _Planner("torch_dist", 1).plan(tensors, folder)
    if is_main:
        put = put | {"common.pt": partial(save_tensors, classic.own(common))}
    buckets = writer.preload_tensors(writer.write_buckets) if writer.write_buckets else []

    def finish(places: list[list]) -> dict:
        del metadata.all_local_plans  # the engine's cache of the plan, for the next save; as large as everything else
        writer.finish(metadata, places)
        save_config(CheckpointingConfig("torch_dist", 1), str(folder))
        return digest_files(folder, [".metadata", "metadata.json"])

    return Plan(Part(folder, put, buckets, [writer.transforms]), finish)


def _dtype_name(engine: Any) -> str:
    """Return the type of the weights, by the engine's config of the model."""
    return "bf16" if engine.bf16 else "fp16" if engine.fp16 else "fp32"


def small_files(contents: Contents, progress: Progress, ckpt_format: str) -> dict[str, Callable[[Path], Any]]:
    """Return the main rank's files beside the tensors, in either format: relative name -> how it is written."""
    layout, model = contents.layout, chunks_of(contents.model)[0]
    config = dataclasses.replace(
        contents.config, ckpt_format=ckpt_format, iteration=progress.iteration,
        tensor_model_parallel_size=layout.tp_size, pipeline_model_parallel_size=layout.pp_size,
        padded_vocab_size=model.vocab_size, dtype=_dtype_name(model.config), digested=True,
    )  # fmt: skip
    return {
        CONFIG: lambda path: write_config(path.parent, config),
        **{name: partial(_write_text, text) for name, text in contents.texts.items()},
        **{f"{TOKENIZER_FOLDER}/{name}": partial(_write_bytes, data) for name, data in contents.tokenizer.items()},
    }


def _write_text(text: str, path: Path) -> None:
    path.write_text(text, encoding="utf-8")


def _write_bytes(data: bytes, path: Path) -> None:
    path.write_bytes(data)


def resume(
    folder: Path, config: CheckpointConfig, model: Any, optimizer: Any, schedule: Any, layout: Layout, seed: int,
    only: Trainable = ALL,
) -> Progress:  # fmt: skip
    """Continue exactly where `folder` was saved: weights, optimizer, schedule, position; on the same layout also the random streams.

    model: the bare chunks. only: the parameters that were saved. Learning rates, betas and epsilon are the flags' of this run, not those
    that were saved.
    """
    flags = {name: optimizer.param_groups[0][name] for name in ("max_lr", "min_lr", "betas", "eps")}
    if config.ckpt_format == "torch":
        state = classic.read(folder, layout)
        _take_rates(state["optimizer"], flags)
        fill_chunks(model, state["model"], folder)
        classic.load_optimizer(folder, state, optimizer, layout)
    else:
        state, put_back = _read_sharded(folder, model, optimizer, layout, only)
        fill_chunks(model, state.get("model", {}), folder, only)
        _take_rates(state["optimizer"], flags)
        put_back(state["optimizer"])
    for group in optimizer.param_groups:
        group.update(flags)
    schedule.load_state_dict(state["schedule"])
    progress = Progress(**state["progress"])
    if sorted(state.get("rng", ())) == sorted(_streams()):
        _restore_rng(state["rng"])
    else:
        seed_everything(seed + progress.iteration, layout)
        same_layout = state["sizes"] == layout.sizes
        before = "on another kind of device" if same_layout else f"with TP, PP, DP = {state['sizes']}"
        log.info(f"the checkpoint was saved {before}: random streams start anew")
    return progress


def _take_rates(saved: Any, flags: dict[str, Any]) -> None:
    """Give the groups of parameters in an optimizer's state this run's learning rates, wherever in it they lie.

    megatron-core 0.19 knows a group again by them, among others: one that was saved with other rates would not be found.
    """
    if not isinstance(saved, dict):
        return
    for group in saved.get("param_groups", ()):
        group.update(max_lr=flags["max_lr"], min_lr=flags["min_lr"])
    for part in saved.values():
        _take_rates(part, flags)


def _read_sharded(
    folder: Path, model: Any, optimizer: Any, layout: Layout, only: Trainable
) -> tuple[dict[str, Any], Callable]:
    """Return this rank's part of a torch_dist checkpoint, and the function that loads its "optimizer". "rng" is included only if layout
    and kind of device are the same.
    """
    metadata, common = read_description(folder)
    if "progress" not in common:
        raise no_training_state(folder)
    weights, streams = sharded_weights(model, only), _rng_tensors(layout)
    saved = optimizer_state(optimizer, weights)
    state = {"model": weights, "optimizer": saved.to_load()}
    same_layout = common["sizes"] == layout.sizes
    same_device = common.get("streams", sorted(streams)) == sorted(streams)  # a GPU has one more stream than a CPU
    if same_layout and same_device:
        state["rng"] = streams
    _check_together(metadata, state, folder)
    state = engine_load(state, folder)
    return state | {"rng": {name: row[0] for name, row in state.get("rng", {}).items()}}, saved.put_back


def _check_together(metadata: Metadata, state: dict[str, Any], folder: Path) -> None:
    """Call check_tensors and raise its error on every rank, because each rank loads other tensors."""
    problem = None
    try:
        check_tensors(metadata, state, folder, cast_weights=False)
    except CheckpointError as error:
        problem = error
    raise_together(problem)


def _streams() -> dict[str, torch.Tensor]:
    """Return all random streams of this rank, as bytes."""
    streams = {**device.rng_state(), **tensor_parallel.get_cuda_rng_tracker().get_states()}
    return {name: state.cpu().clone() for name, state in streams.items()}


def _rng_tensors(layout: Layout) -> dict[str, ShardedTensor]:
    """Return this rank's random streams: for each stream one row of a [world size, bytes] tensor."""
    rows = ((0, layout.rank, layout.world_size),)
    return {
        name: ShardedTensor.from_rank_offsets(f"rng.{name}", state[None], *rows, replica_id=0)
        for name, state in _streams().items()
    }


def _restore_rng(states: dict[str, torch.Tensor]) -> None:
    device.set_rng_state(states)
    tracker = tensor_parallel.get_cuda_rng_tracker()
    tracker.set_states({name: states[name] for name in tracker.get_states()})
