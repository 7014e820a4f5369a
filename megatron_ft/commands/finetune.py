"""megatron-ft finetune: train a checkpoint on role-labelled shards, in any layout."""

from __future__ import annotations

import contextlib
import dataclasses
import sys
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

from megatron_ft.checkpoints.folder import SETTINGS, TRAINED_ON
from megatron_ft.config.checks import (
    check_training,
    classic_saves_fit,
    data_parallel_size,
    microbatches_fit_chunks,
    overlaps_have_a_subject,
    places_to_write,
    recompute_groups_fit,
)
from megatron_ft.config.cli import Command, run_script, write_sections
from megatron_ft.config.sections import (
    TRAINING,
    Batch,
    Checkpointing,
    Data,
    Kernels,
    Launching,
    Logging,
    Model,
    Numerics,
    Optimizer,
    Parallelism,
    Stopping,
)
from megatron_ft.files import check_writable

if TYPE_CHECKING:
    from megatron_ft.checkpoints.folder import CheckpointConfig

LOG = "finetune.log"
"""What all ranks log, libraries' warnings included; in the run's folder."""

COMMAND = Command(
    name="finetune",
    summary="train a checkpoint on pretokenized chats",
    sections=TRAINING,
    examples=(
        "megatron-ft finetune --nproc_per_node 4 --load runs/model --data_path data/chats-train "
        "--tensor_model_parallel_size 2 --pipeline_model_parallel_size 2 --train_iters 100 --save runs/tuned",
        "megatron-ft finetune --config finetune.yaml --lr 2e-5",
    ),
)


def run(
    checkpointing: Checkpointing, data: Data, batch: Batch, parallel: Parallelism, optimizer: Optimizer,
    numerics: Numerics, logging: Logging, model: Model, kernels: Kernels, launching: Launching, stopping: Stopping,
) -> int:  # fmt: skip
    """Check, build, load, train, save. Raises UserError for anything the user can put right."""
    from megatron_ft.checkpoints import select
    from megatron_ft.checkpoints.folder import check_sizes, check_training_state, describe
    from megatron_ft.checkpoints.lock import FolderLock
    from megatron_ft.commands import rehearse
    from megatron_ft.device import order_streams
    from megatron_ft.engine.parallel import process_groups, world_size
    from megatron_ft.engine.start import prepare_engine
    from megatron_ft.launch.places import join_srun
    from megatron_ft.launch.run import launch, planned
    from megatron_ft.models.kernels import check_context_parallel
    from megatron_ft.models.machine import glance
    from megatron_ft.models.pipeline import split_layers
    from megatron_ft.training import agreement, datasets
    from megatron_ft.training.stopping import StopRequest, time_limit

    def read(folder: Path) -> CheckpointConfig:
        return agreement.check_model_flags(model, describe(folder))

    settings = Settings(
        checkpointing, data, batch, parallel, optimizer, numerics, logging, model, kernels, launching, stopping
    )
    join_srun(launching)
    if parallel.tensor_model_parallel_size > 1:
        order_streams()
    if rehearse.wanted(launching):
        return rehearse.rehearse(settings, run)
    starts = planned(launching)
    processes = starts.world_size if starts else world_size()
    check_training(checkpointing, data, batch, parallel, optimizer, numerics, logging, world_size=processes)
    overlaps_have_a_subject(kernels, parallel)
    if parallel.context_parallel_size > 1:
        check_context_parallel(parallel, glance())
    # Whatever can be told without torch is told before the processes wait for each other.
    for flag, place in places_to_write(checkpointing, logging, launching).items():
        check_writable(flag, place)
    asked = checkpointing
    folders, checkpointing = select.sources(asked)
    settings = settings._replace(checkpointing=checkpointing)
    number, described = select.first_whole(folders, read, checkpointing)
    source = folders[number]
    split = split_layers(described.architecture.num_layers, parallel)
    check_sizes(source, described, parallel.tensor_model_parallel_size, split.stages, split)
    classic_saves_fit(checkpointing, split.is_plain)
    dp_size = data_parallel_size(parallel, processes)
    microbatches_fit_chunks(parallel, batch, data, dp_size, split.virtual_size)
    recompute_groups_fit(numerics, [len(chunk) for stage in split.chunks for chunk in stage])
    if not _starts_anew(described, checkpointing):
        check_training_state(source, described)
    train_set, valid_set = datasets.make_datasets(data, described)
    described = datasets.with_chat_format(described, train_set)
    if starts and (code := launch(starts, launching.log_dir, prepare_engine)) is not None:
        return code  # the ranks have done what follows
    groups = process_groups(
        parallel.tensor_model_parallel_size,
        parallel.pipeline_model_parallel_size,
        parallel.sequence_parallel,
        parallel.distributed_timeout_minutes,
        data.seed,
        split.virtual_size,
        parallel.context_parallel_size,
    )
    with (
        StopRequest(time_limit(stopping), stopping.exit_interval) as stop,
        groups as layout,
        contextlib.ExitStack() as held,
    ):
        if checkpointing.save and not launching.dry_run:
            held.enter_context(FolderLock(Path(checkpointing.save), layout))
        select.agree(folders, number, asked, layout)
        source, described = select.first_trusted(
            folders[number:], described, read, layout, checkpointing.verify_checkpoint
        )
        return _train(layout, source, described, train_set, valid_set, settings, stop, held)


class Settings(NamedTuple):
    """All sections, in the order of TRAINING."""

    checkpointing: Checkpointing
    data: Data
    batch: Batch
    parallel: Parallelism
    optimizer: Optimizer
    numerics: Numerics
    logging: Logging
    model: Model
    kernels: Kernels
    launching: Launching
    stopping: Stopping


def _train(layout, source, described, train_set, valid_set, settings: Settings, stop, held) -> int:
    """held: an ExitStack; what the run holds until it ends."""
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
    from megatron_ft.training import agreement, run_record, sample_hash, setup
    from megatron_ft.training.guard import attempt
    from megatron_ft.training.loop import Run, train
    from megatron_ft.training.step import Stepper
    from megatron_ft.training.trained_on import trained_on

    log = logger("finetune")
    checkpointing, data, batch, parallel, optimizer, numerics, logging, _, kernels, *_ = settings
    model = setup.make_model(described.architecture, layout, data, parallel, numerics, kernels, vocab_rows(described))
    adam = make_optimizer(model, optimizer, numerics, parallel.use_distributed_optimizer)
    schedule = make_schedule(adam, optimizer, batch)
    rows = batch.global_batch_size or batch.micro_batch_size * layout.dp_size
    stepper = Stepper(
        model, layout, batch.micro_batch_size, rows, exact_phases=logging.log_timers_to_tensorboard,
        dropout_seed=data.seed if numerics.hidden_dropout else None,
    )  # fmt: skip

    if _starts_anew(described, checkpointing):
        load_weights(source, described, setup.bare(model), layout, verified=True)
        adam.reload_model_params()
        progress = training_state.Progress(samples_hash=sample_hash.beginning(train_set))
    else:
        progress = training_state.resume(source, described, setup.bare(model), adam, schedule, layout, data.seed)
        agreement.tell_changes(source / SETTINGS, data, batch, parallel, optimizer, numerics)
        kept = sample_hash.check_resumed(progress.samples_hash, train_set, progress.consumed_samples)
        progress = dataclasses.replace(progress, samples_hash=kept)
    if settings.launching.dry_run:
        return dry_run.show(layout, settings, described, progress, train_set, setup.bare(model), rows)
    if folder := _run_folder(checkpointing, logging):  # not before: a run that cannot start leaves nothing behind
        log_to_file(file=folder / LOG)
    log.info(f"{layout} on {device.describe()}; weights from {source}")
    if layout.is_main:
        choice = choose(kernels, numerics, machine(), attention_needs(described.architecture))
        agreement.report_kernels(kernels, choice, device.has_gpu())
    if progress.iteration:
        log.info(f"resuming at iteration {progress.iteration}, {progress.consumed_samples} rows consumed")
    if progress.iteration >= batch.train_iters:
        log.warning(
            f"nothing left to train: --train_iters {batch.train_iters} counts from the run's start; raise it to go on"
        )
    log.info(
        f"{train_set.num_samples} samples in {len(train_set.epoch_rows(0))} rows of {data.seq_length}, "
        f"{train_set.fill():.1%} of positions filled"
    )

    save_to = Path(checkpointing.save) if checkpointing.save else None
    resolved = write_sections(settings)

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
        log.warning("steps since the last checkpoint are not saved (SIGTERM would have saved them: kill -TERM)")
        raise
    finally:
        if reports_to and logging.report:
            write_at_end(reports_to)
    if done.iteration < batch.train_iters:
        new = done.iteration > progress.iteration
        where = (
            "nothing new to save" if not new else f"saved in {save_to}" if save_to else "not saved, there is no --save"
        )
        log.warning(f"{stop.reason} at iteration {done.iteration} of {batch.train_iters}, {where}")
        return stop.exit_code
    return 0


def _starts_anew(described: CheckpointConfig, checkpointing: Checkpointing) -> bool:
    """Whether only weights are taken: converted ones, or because --finetune says so."""
    return described.iteration == "release" or checkpointing.finetune


def _run_folder(checkpointing: Checkpointing, logging: Logging) -> Path | None:
    """Where the run's own files go: --run_dir, else --save, else nowhere."""
    folder = logging.run_dir or checkpointing.save
    return Path(folder) if folder else None


def _hooks(layout, settings: Settings, resolved: str) -> list:
    """What watches the run, on the one rank that knows the loss."""
    if not layout.is_reporter:
        return []
    from megatron_ft.files import atomic_file
    from megatron_ft.training.boards import TensorBoard, WeightsAndBiases
    from megatron_ft.training.console import make_console
    from megatron_ft.training.guard import Aside, Guarded, attempt
    from megatron_ft.training.hooks import METRICS, MetricsFile

    logging = settings.logging
    folder = _run_folder(settings.checkpointing, logging)

    def write_settings() -> None:
        with atomic_file(folder / SETTINGS, "w") as file:
            file.write(resolved)

    hooks = [
        Guarded("the progress on the screen", lambda: make_console(settings.batch.train_iters, logging.log_interval))
    ]
    if folder:
        hooks.append(Guarded(str(folder / METRICS), lambda: MetricsFile(folder)))
        attempt(str(folder / SETTINGS), write_settings)
    if logging.tensorboard_dir:
        hooks.append(Aside(f"TensorBoard in {logging.tensorboard_dir}", lambda: TensorBoard(logging.tensorboard_dir)))
    if logging.wandb_logger:
        values = {k: v for section in settings for k, v in vars(section).items()}
        name = logging.wandb_name
        hooks.append(Aside("wandb", lambda: WeightsAndBiases(logging.wandb_project, name, folder, values)))
    return hooks


if __name__ == "__main__":
    sys.exit(run_script(COMMAND, run))
