"""megatron-ft finetune: train a checkpoint on role-labelled shards, in any layout."""

from __future__ import annotations

import contextlib
import sys
from pathlib import Path

from megatron_ft.config.checks import check_settings, places_to_write
from megatron_ft.config.cli import Command, run_script
from megatron_ft.config.schedule import doubtful_rate
from megatron_ft.config.settings import COMMON, TrainingSettings
from megatron_ft.files import check_writable
from megatron_ft.log import logger

log = logger("finetune")

COMMAND = Command(
    name="finetune",
    summary="train a checkpoint on pretokenized chats",
    sections=(TrainingSettings,),
    examples=(
        "megatron-ft finetune --nproc_per_node 4 --load runs/model --data_path data/chats-train "
        "--tensor_model_parallel_size 2 --pipeline_model_parallel_size 2 --train_iters 100 --save runs/tuned",
        "megatron-ft finetune --config finetune.yaml --lr 2e-5",
    ),
    megatron_flags=True,
    common=(
        *COMMON,
        "log_interval: steps between lines of progress",
        "eval_interval: steps between evaluations",
        "wandb_logger",
        "nproc_per_node: processes on this machine, one per GPU",
        "dry_run: show what would be done, and stop",
    ),
)


def run(settings: TrainingSettings) -> int:
    """Check the settings, start the processes and train. Return the exit code. Raise UserError for everything the user can fix."""
    from megatron_ft.checkpoints import select
    from megatron_ft.checkpoints.lock import FolderLock
    from megatron_ft.commands import rehearse
    from megatron_ft.device import order_streams
    from megatron_ft.engine.parallel import ParallelSizes, process_groups, world_size
    from megatron_ft.engine.start import prepare_engine
    from megatron_ft.generation.prompts import read_references
    from megatron_ft.launch.places import join_srun
    from megatron_ft.launch.run import launch, planned
    from megatron_ft.models.kernels import check_context_parallel
    from megatron_ft.models.machine import glance
    from megatron_ft.models.pipeline import split_layers
    from megatron_ft.training import datasets
    from megatron_ft.training.fit import find_start
    from megatron_ft.training.length import with_steps
    from megatron_ft.training.stopping import StopRequest, time_limit

    parallel, data, launching, stopping = settings.parallel, settings.data, settings.launching, settings.stopping
    join_srun(launching)
    if parallel.tensor_model_parallel_size > 1:
        order_streams()
    if rehearse.requested(launching):
        return rehearse.rehearse(settings, run)
    starts = planned(launching)
    processes = starts.world_size if starts else world_size()
    check_settings(settings, processes)
    if doubt := doubtful_rate(settings.optimizer):
        log.warning(doubt)
    if parallel.context_parallel_size > 1:
        check_context_parallel(parallel, glance())
    # Everything that needs no torch is checked before the processes wait for each other.
    for flag, place in places_to_write(settings).items():
        check_writable(flag, place)
    if asked := settings.logging.sample_prompts:
        read_references(Path(asked))
    requested = settings.checkpointing
    start = find_start(settings, processes)
    settings, described = start.settings, start.described
    train_set, valid_set = datasets.make_datasets(data, described, settings.distillation)
    settings = with_steps(settings, train_set, processes)
    described = datasets.with_chat_format(described, train_set)
    if starts and (code := launch(starts, launching.log_dir, prepare_engine)) is not None:
        return code  # the ranks have run the lines below
    chunks = split_layers(described.architecture.num_layers, parallel).virtual_size
    groups = process_groups(ParallelSizes.of(parallel, chunks), data.seed, parallel.distributed_timeout_minutes)
    with (
        StopRequest(time_limit(stopping), stopping.exit_interval) as stop,
        groups as layout,
        contextlib.ExitStack() as held,
    ):
        checkpointing = settings.checkpointing
        if checkpointing.save and not launching.dry_run:
            held.enter_context(FolderLock(Path(checkpointing.save), layout))
        select.agree(start.folders, start.index, requested, layout)
        source, described = select.first_trusted(
            start.folders[start.index :], described, start.read, layout, checkpointing.verify_checkpoint
        )
        # It imports the engine, which process_groups has prepared.
        from megatron_ft.commands.finetune_rank import Inputs, run_rank

        return run_rank(Inputs(layout, source, described, train_set, valid_set, settings), stop, held)


if __name__ == "__main__":
    sys.exit(run_script(COMMAND, run))
