"""megatron-ft finetune: train a checkpoint on role-labelled shards, in any layout."""

from __future__ import annotations

import contextlib
import dataclasses
import sys
from pathlib import Path
from typing import TYPE_CHECKING

from megatron_ft.checkpoints.folder import SETTINGS, TRAINED_ON
from megatron_ft.config.checks import check_settings, places_to_write
from megatron_ft.config.cli import Command, run_script, write_sections
from megatron_ft.config.sections import Checkpointing, Logging
from megatron_ft.config.settings import TrainingSettings
from megatron_ft.files import check_writable

if TYPE_CHECKING:
    from megatron_ft.checkpoints.folder import CheckpointConfig
    from megatron_ft.data.loader import ChatDataset
    from megatron_ft.engine.parallel import Layout
    from megatron_ft.training.hooks import Hook
    from megatron_ft.training.stopping import StopRequest

LOG = "finetune.log"
"""Log file of all ranks in the run's folder, warnings of libraries included."""

COMMAND = Command(
    name="finetune",
    summary="train a checkpoint on pretokenized chats",
    sections=(TrainingSettings,),
    examples=(
        "megatron-ft finetune --nproc_per_node 4 --load runs/model --data_path data/chats-train "
        "--tensor_model_parallel_size 2 --pipeline_model_parallel_size 2 --train_iters 100 --save runs/tuned",
        "megatron-ft finetune --config finetune.yaml --lr 2e-5",
    ),
)


def run(settings: TrainingSettings) -> int:
    """Check, build, load, train, save; return the exit code. Raise UserError for everything the user can fix."""
    from megatron_ft.checkpoints import select
    from megatron_ft.checkpoints.lock import FolderLock
    from megatron_ft.commands import rehearse
    from megatron_ft.device import order_streams
    from megatron_ft.engine.parallel import ParallelSizes, process_groups, world_size
    from megatron_ft.engine.start import prepare_engine
    from megatron_ft.launch.places import join_srun
    from megatron_ft.launch.run import launch, planned
    from megatron_ft.models.kernels import check_context_parallel
    from megatron_ft.models.machine import glance
    from megatron_ft.models.pipeline import split_layers
    from megatron_ft.training import datasets
    from megatron_ft.training.fit import find_start
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
    if parallel.context_parallel_size > 1:
        check_context_parallel(parallel, glance())
    # Everything that needs no torch is checked before the processes wait for each other.
    for flag, place in places_to_write(settings).items():
        check_writable(flag, place)
    requested = settings.checkpointing
    start = find_start(settings, processes)
    settings, described = start.settings, start.described
    train_set, valid_set = datasets.make_datasets(data, described)
    described = datasets.with_chat_format(described, train_set)
    if starts and (code := launch(starts, launching.log_dir, prepare_engine)) is not None:
        return code  # the ranks have done what follows
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
        return _train(layout, source, described, train_set, valid_set, settings, stop, held)


def _train(
    layout: Layout, source: Path, described: CheckpointConfig, train_set: ChatDataset, valid_set: ChatDataset | None,
    settings: TrainingSettings, stop: StopRequest, held: contextlib.ExitStack,
) -> int:  # fmt: skip
    """Build, load and train on this rank; return the exit code. held: what stays open until the run ends."""
    from megatron_ft import device
    from megatron_ft.checkpoints import training_state
    from megatron_ft.checkpoints.folder import vocab_rows
    from megatron_ft.checkpoints.load import load_weights
    from megatron_ft.commands import dry_run
    from megatron_ft.commands.report import write_at_end
    from megatron_ft.engine.optimizer import make_optimizer, make_schedule
    from megatron_ft.log import logger
    from megatron_ft.log import setup as log_to_file
    from megatron_ft.models.build import attention_needs
    from megatron_ft.models.kernels import choose, machine
    from megatron_ft.models.trainable import Trainable, count
    from megatron_ft.training import run_record, sample_hash, setup
    from megatron_ft.training.fit import starts_anew
    from megatron_ft.training.guard import attempt
    from megatron_ft.training.kernel_report import report_kernels
    from megatron_ft.training.loop import Run, train
    from megatron_ft.training.resumed import log_changes
    from megatron_ft.training.step import Stepper
    from megatron_ft.training.trained_on import trained_on

    log = logger("finetune")
    checkpointing, data, batch, parallel = settings.checkpointing, settings.data, settings.batch, settings.parallel
    optimizer, numerics, logging, kernels = settings.optimizer, settings.numerics, settings.logging, settings.kernels
    trainable = Trainable(tuple(optimizer.unfrozen_parameters))
    model = setup.make_model(
        described.architecture, layout, data, parallel, numerics, kernels, vocab_rows(described), trainable
    )
    adam = make_optimizer(model, optimizer, numerics, parallel.use_distributed_optimizer)
    schedule = make_schedule(adam, optimizer, batch)
    rows = batch.global_batch_size or batch.micro_batch_size * layout.dp_size
    stepper = Stepper(
        model, layout, batch.micro_batch_size, rows, exact_phases=logging.log_timers_to_tensorboard,
        dropout_seed=data.seed if numerics.hidden_dropout else None,
    )  # fmt: skip

    if starts_anew(described, checkpointing):
        load_weights(source, described, setup.bare(model), layout, verified=True)
        adam.reload_model_params()
        progress = training_state.Progress(samples_hash=sample_hash.beginning(train_set))
    else:
        progress = training_state.resume(source, described, setup.bare(model), adam, schedule, layout, data.seed)
        log_changes(source / SETTINGS, settings)
        samples_hash = sample_hash.check_resumed(progress.samples_hash, train_set, progress.consumed_samples)
        progress = dataclasses.replace(progress, samples_hash=samples_hash)
    if settings.launching.dry_run:
        return dry_run.show(layout, settings, described, progress, train_set, setup.bare(model), rows)
    if folder := _run_folder(checkpointing, logging):  # only now: a run that cannot start leaves no files
        log_to_file(file=folder / LOG)
    log.info(f"{layout} on {device.describe()}; weights from {source}")
    if trainable.patterns:
        trained, whole = count(described.architecture, trainable)
        log.info(f"{trained:,} of {whole:,} parameters are trained ({trained / whole:.1%}), the others are frozen")
    if layout.is_main:
        choice = choose(kernels, numerics, machine(), attention_needs(described.architecture))
        report_kernels(kernels, choice, device.has_gpu())
    if progress.iteration:
        log.info(f"resuming at iteration {progress.iteration}, {progress.consumed_samples} rows consumed")
    if progress.iteration >= batch.train_iters:
        log.warning(
            f"nothing left to train: --train_iters {batch.train_iters} counts from the run's first start; increase it to continue"
        )
    log.info(
        f"{train_set.num_samples} samples in {len(train_set.epoch_rows(0))} rows of {data.seq_length}, "
        f"{train_set.fill():.1%} of positions filled"
    )

    save_to = Path(checkpointing.save) if checkpointing.save else None
    resolved = write_sections(settings.sections)

    contents = training_state.Contents(
        described,
        setup.bare(model),
        adam,
        schedule,
        layout,
        {SETTINGS: resolved, TRAINED_ON: trained_on(train_set)},
        training_state.read_tokenizer(source, described) if layout.is_main else {},
    )
    saver = held.enter_context(training_state.make_saver(contents, checkpointing))
    start = run_record.start_of_run(
        setup.bare(model),
        layout,
        described,
        data,
        train_set,
        valid_set,
        source,
        progress.iteration,
        batch.train_iters,
    )
    reports_to = folder if layout.is_reporter else None
    if reports_to:
        attempt(str(reports_to / run_record.RUN), lambda: run_record.record(reports_to, start))

    plan = Run(
        stepper, train_set, valid_set, adam, schedule, hooks=_hooks(layout, settings, resolved),
        saver=saver, train_iters=batch.train_iters, save_interval=checkpointing.save_interval,
        eval_interval=logging.eval_interval, eval_iters=logging.eval_iters, max_skipped=batch.max_skipped_iters,
        check_replicas_every=numerics.check_replicas_every, architecture=described.architecture,
    )  # fmt: skip
    try:
        done = train(plan, progress, stop)
    except KeyboardInterrupt:
        log.warning("steps since the last checkpoint are not saved; to save before stopping, send SIGTERM (kill -TERM)")
        raise
    finally:
        if reports_to and logging.report:
            write_at_end(reports_to)
    if done.iteration < batch.train_iters:
        new = done.iteration > progress.iteration
        where = (
            "nothing new to save" if not new else f"saved in {save_to}" if save_to else "not saved: --save is not set"
        )
        log.warning(f"{stop.reason} at iteration {done.iteration} of {batch.train_iters}, {where}")
        return stop.exit_code
    return 0


def _run_folder(checkpointing: Checkpointing, logging: Logging) -> Path | None:
    """Return the folder for the run's own files: --run_dir, else --save, else None."""
    folder = logging.run_dir or checkpointing.save
    return Path(folder) if folder else None


def _hooks(layout: Layout, settings: TrainingSettings, resolved: str) -> list[Hook]:
    """Return the hooks of the run: progress, metrics and loggers on the one rank that knows the loss, [] on all others."""
    if not layout.is_reporter:
        return []
    from megatron_ft.files import atomic_file
    from megatron_ft.training.console import make_console
    from megatron_ft.training.guard import Aside, Guarded, attempt
    from megatron_ft.training.hooks import METRICS, MetricsFile
    from megatron_ft.training.tensorboard_hook import TensorBoard
    from megatron_ft.training.wandb_hook import WeightsAndBiases

    logging = settings.logging
    folder = _run_folder(settings.checkpointing, logging)

    hooks: list[Hook] = [
        Guarded("the progress on the screen", lambda: make_console(settings.batch.train_iters, logging.log_interval))
    ]
    if folder:

        def write_settings() -> None:
            with atomic_file(folder / SETTINGS, "w") as file:
                file.write(resolved)

        hooks.append(Guarded(str(folder / METRICS), lambda: MetricsFile(folder)))
        attempt(str(folder / SETTINGS), write_settings)
    if board := logging.tensorboard_dir:
        hooks.append(Aside(f"TensorBoard in {board}", lambda: TensorBoard(board)))
    if logging.wandb_logger:
        values = {k: v for section in settings.sections for k, v in vars(section).items()}
        name = logging.wandb_name
        hooks.append(Aside("wandb", lambda: WeightsAndBiases(logging.wandb_project, name, folder, values)))
    return hooks


if __name__ == "__main__":
    sys.exit(run_script(COMMAND, run))
