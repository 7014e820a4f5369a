"""The part of finetune that every rank runs: build the model, load the checkpoint, train.

finetune.py has already checked the settings, started the processes and chosen the checkpoint.
"""

from __future__ import annotations

import contextlib
import dataclasses
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from megatron_ft import device
from megatron_ft.adapters.base import load_base, weight_hashes
from megatron_ft.adapters.lora import fill_adapters, initialise
from megatron_ft.adapters.new_rows import summing
from megatron_ft.adapters.spec import TRAINED
from megatron_ft.checkpoints import training_state
from megatron_ft.checkpoints.folder import SETTINGS, TRAINED_ON, CheckpointConfig, vocab_rows
from megatron_ft.checkpoints.load import load_weights
from megatron_ft.checkpoints.quantised import nf4_of
from megatron_ft.checkpoints.training_state import Progress
from megatron_ft.checkpoints.verify import verify
from megatron_ft.commands import dry_run
from megatron_ft.commands.report import write_at_end
from megatron_ft.commands.training_samples import Asking, make_sampler
from megatron_ft.config.cli import write_sections
from megatron_ft.config.sections import Adapters, Logging
from megatron_ft.config.sections import Distillation as DistillationSection
from megatron_ft.config.settings import TrainingSettings
from megatron_ft.data.loader import ChatDataset
from megatron_ft.engine.optimizer import make_optimizer, make_schedule
from megatron_ft.engine.parallel import Layout
from megatron_ft.files import atomic_file
from megatron_ft.log import ONLY_IN_FILE, logger
from megatron_ft.log import setup as log_to_file
from megatron_ft.models.architecture import Architecture
from megatron_ft.models.build import attention_needs
from megatron_ft.models.distilled_loss import Mix
from megatron_ft.models.kernels import choose, machine
from megatron_ft.models.sparsity import ZeroCounts
from megatron_ft.models.trainable import ALL, Trainable
from megatron_ft.training import run_record, sample_hash, setup
from megatron_ft.training.adapting import Adapting, find_adapting
from megatron_ft.training.console import make_console
from megatron_ft.training.fit import starts_anew
from megatron_ft.training.guard import Aside, Guarded, attempt
from megatron_ft.training.hooks import METRICS, SAMPLES, Hook, MetricsFile, SamplesFile
from megatron_ft.training.kernel_report import report_kernels
from megatron_ft.training.loop import Run, train
from megatron_ft.training.objectives.distillation import Distillation
from megatron_ft.training.objectives.objective import Objective
from megatron_ft.training.resumed import log_changes
from megatron_ft.training.samples import Sampler
from megatron_ft.training.start_lines import Start
from megatron_ft.training.step import Stepper
from megatron_ft.training.stopping import StopRequest
from megatron_ft.training.teacher import Teacher, find_teacher, stored_teachers
from megatron_ft.training.tensorboard_hook import TensorBoard
from megatron_ft.training.trained_on import trained_on
from megatron_ft.training.wandb_hook import WeightsAndBiases

LOG = "finetune.log"
"""Log file of all ranks in the run's folder, warnings of libraries included."""

log = logger("finetune")


@dataclass(frozen=True)
class Inputs:
    """The inputs of a run. All ranks have agreed on them. source: folder of the checkpoint. described: its description."""

    layout: Layout
    source: Path
    described: CheckpointConfig
    train_set: ChatDataset
    valid_set: ChatDataset | None
    settings: TrainingSettings

    @property
    def folder(self) -> Path | None:
        """The folder for the run's own files: --run_dir, else --save, else None."""
        folder = self.settings.logging.run_dir or self.settings.checkpointing.save
        return Path(folder) if folder else None

    @property
    def reports_to(self) -> Path | None:
        """The folder for the record and report of the run, on the reporting rank; None on the others."""
        return self.folder if self.layout.is_reporter else None

    @property
    def rows(self) -> int:
        """Rows of a global batch."""
        batch = self.settings.batch
        return batch.global_batch_size or batch.micro_batch_size * self.layout.dp_size


@dataclass(frozen=True)
class Parts:
    """The objects that training changes, on this rank. model: its chunks."""

    model: list
    optimizer: Any
    schedule: Any
    stepper: Stepper

    @property
    def bare(self) -> list:
        """The chunks without their wrappers."""
        return setup.bare(self.model)


def run_rank(inputs: Inputs, stop: StopRequest, held: contextlib.ExitStack) -> int:
    """Build, load and train on this rank. Return the exit code. held: what stays open until the run ends."""
    settings, layout = inputs.settings, inputs.layout
    adapting = find_adapting(
        settings, inputs.described, inputs.source, starts_anew(inputs.described, settings.checkpointing)
    )
    trainable = TRAINED if adapting else Trainable(tuple(settings.optimizer.unfrozen_parameters))
    teacher = find_teacher(settings, inputs.described)
    parts = _build(inputs, trainable, adapting, teacher)
    if adapting:
        inputs, progress = _load_adapters(inputs, parts, adapting)
    else:
        progress = _load(inputs, parts)
    distilled = _load_teacher(inputs, parts, teacher)
    if settings.launching.dry_run:
        return dry_run.show(layout, settings, inputs.described, progress, inputs.train_set, parts.bare, inputs.rows)
    asking = Asking(settings, inputs.source, inputs.described, parts.model, layout)
    sampler, unasked = make_sampler(asking, inputs.train_set, inputs.valid_set)
    if inputs.folder:  # only now: a run that cannot start leaves no files
        log_to_file(file=inputs.folder / LOG)
    _log_start(inputs, trainable, progress, adapting)
    if unasked:
        log.info(unasked, extra={} if layout.cp_size > 1 else ONLY_IN_FILE)
    # Without adapters and without a teacher their sections are left out.
    resolved = write_sections(
        [section for section in settings.sections if section not in (Adapters(), DistillationSection())]
    )
    saver = held.enter_context(_make_saver(inputs, parts, resolved))
    _record_start(inputs, parts, progress, distilled)
    run = _make_run(inputs, parts, saver, _hooks(inputs, resolved, bool(progress.iteration)), sampler)
    done = _train(inputs, run, progress, stop)
    if done.iteration < settings.batch.train_iters:
        _log_stop(inputs, progress, done, stop)
        return stop.exit_code
    if said := run.skipped.judge(settings.optimizer.lr):
        log.warning(said)
    return 0


def _build(inputs: Inputs, trainable: Trainable, adapting: Adapting | None, teacher: Teacher | None) -> Parts:
    """Build the model with new weights, its optimizer and its schedule."""
    settings, described = inputs.settings, inputs.described
    numerics = settings.numerics
    model = setup.make_model(
        described.architecture, inputs.layout, settings.data, settings.parallel, numerics, settings.kernels,
        vocab_rows(adapting.described if adapting else described), trainable, adapting.lora if adapting else None,
        nf4_of(adapting.described) if adapting else None, teacher,
    )  # fmt: skip
    optimizer = make_optimizer(model, settings.optimizer, numerics, settings.parallel.use_distributed_optimizer)
    schedule = make_schedule(optimizer, settings.optimizer, settings.batch)
    stepper = Stepper(
        model, inputs.layout, settings.batch.micro_batch_size, inputs.rows,
        exact_phases=settings.logging.log_timers_to_tensorboard,
        dropout_seed=settings.data.seed if numerics.hidden_dropout or (adapting and adapting.lora.dropout) else None,
        before_reduction=summing(setup.bare(model), described.architecture.tied_embeddings),
        objective=_objective(settings),
        zeros=_zeros(settings.logging, described.architecture, setup.bare(model)),
    )  # fmt: skip
    return Parts(model, optimizer, schedule, stepper)


def _objective(settings: TrainingSettings) -> Objective | None:
    """Return what is minimised; None: cross-entropy."""
    one = settings.distillation
    if not one.has_teacher:
        return None
    return Distillation(Mix(one.ce_weight, one.kd_weight, one.kd_temperature))


def _load_teacher(inputs: Inputs, parts: Parts, teacher: Teacher | None) -> dict[str, Any] | None:
    """Fill the weights of a resident teacher. Return what run.json says of the teacher, None without one. All ranks call it."""
    if teacher is None:
        return stored_teachers(inputs.train_set)
    folder, described, chunks = teacher.folder, teacher.described, setup.teachers(parts.model)
    verify(folder, described, inputs.layout, inputs.settings.checkpointing.verify_checkpoint)
    load_weights(folder, described, chunks, inputs.layout, verified=True)
    return {"path": str(folder.resolve()), "weights": weight_hashes(chunks, described.architecture)}


def _zeros(logging: Logging, arch: Architecture, bare: list) -> ZeroCounts | None:
    """Return what counts the zeros in the MLPs; None: they are not logged."""
    wanted = arch.has_zeros if logging.log_sparsity is None else logging.log_sparsity
    return ZeroCounts(bare, arch.num_layers) if wanted else None


def _load(inputs: Inputs, parts: Parts) -> Progress:
    """Load the checkpoint: only the weights for a new run, the whole state for a resumed one. Return its progress."""
    settings, source, train_set = inputs.settings, inputs.source, inputs.train_set
    if starts_anew(inputs.described, settings.checkpointing):
        load_weights(source, inputs.described, parts.bare, inputs.layout, verified=True)
        parts.optimizer.reload_model_params()
        return Progress(samples_hash=sample_hash.beginning(train_set))
    progress = training_state.resume(
        source, inputs.described, parts.bare, parts.optimizer, parts.schedule, inputs.layout, settings.data.seed
    )
    return _resumed(inputs, progress)


def _resumed(inputs: Inputs, progress: Progress) -> Progress:
    """Compare settings and data with those of the run that was stopped."""
    log_changes(inputs.source / SETTINGS, inputs.settings)
    samples_hash = sample_hash.check_resumed(progress.samples_hash, inputs.train_set, progress.consumed_samples)
    return dataclasses.replace(progress, samples_hash=samples_hash)


def _load_adapters(inputs: Inputs, parts: Parts, adapting: Adapting) -> tuple[Inputs, Progress]:
    """Load the base, and adapters: new ones, or those of the checkpoint, whose whole state is loaded if it is resumed.

    Return the inputs with the description of this run's checkpoints, and the progress.
    """
    settings, layout, bare = inputs.settings, inputs.layout, parts.bare
    if adapting.base != inputs.source:
        verify(adapting.base, adapting.described, layout, settings.checkpointing.verify_checkpoint)
    hashes = load_base(adapting.base, adapting.described, bare, layout, adapting.recorded, adapting.nf4)
    if adapting.peft:
        fill_adapters(bare, adapting.peft.read, layout.tp_size, layout.tp_rank)
    elif inputs.described.adapter is None:
        arch = inputs.described.architecture
        initialise(bare, arch, adapting.lora, settings.data.seed, layout.tp_size, layout.tp_rank)
    elif settings.checkpointing.finetune:
        load_weights(inputs.source, inputs.described, bare, layout, verified=True, only=TRAINED)
    parts.optimizer.reload_model_params()
    described = dataclasses.replace(inputs.described, adapter=adapting.entry(hashes), quantization=None)
    if starts_anew(inputs.described, settings.checkpointing):
        progress = Progress(samples_hash=sample_hash.beginning(inputs.train_set))
        return dataclasses.replace(inputs, described=described), progress
    progress = training_state.resume(
        inputs.source, inputs.described, bare, parts.optimizer, parts.schedule, layout, settings.data.seed, TRAINED
    )
    return dataclasses.replace(inputs, described=described), _resumed(inputs, progress)


def _log_start(inputs: Inputs, trainable: Trainable, progress: Progress, adapting: Adapting | None) -> None:
    """Log in four lines what is trained, on what, how long and where to; in the log file also with which kernels."""
    settings = inputs.settings
    start = Start(
        settings, inputs.layout, inputs.source, inputs.described, trainable, adapting, inputs.train_set, inputs.valid_set,
        inputs.rows, progress, inputs.folder,
    )  # fmt: skip
    for line in start.lines():
        log.info(line)
    log.info(f"computing on {device.describe()}", extra=ONLY_IN_FILE)
    if adapting:
        log.info(f"adapters on {', '.join(adapting.lora.targets)}", extra=ONLY_IN_FILE)
    if inputs.layout.is_main:
        arch = inputs.described.architecture
        choice = choose(settings.kernels, settings.numerics, machine(), attention_needs(arch))
        report_kernels(settings.kernels, choice, device.has_gpu())
    train_iters = settings.batch.train_iters
    if progress.iteration >= train_iters:
        log.warning(
            f"nothing left to train: --train_iters {train_iters} counts from the run's first start; increase it (or --epochs) to continue"
        )


def _make_saver(inputs: Inputs, parts: Parts, resolved: str) -> contextlib.AbstractContextManager[Any]:
    """Return the saver of the run as a context manager. resolved: the settings as YAML."""
    described = inputs.described
    contents = training_state.Contents(
        described, parts.bare, parts.optimizer, parts.schedule, inputs.layout,
        {SETTINGS: resolved, TRAINED_ON: trained_on(inputs.train_set)},
        training_state.read_tokenizer(inputs.source, described) if inputs.layout.is_main else {},
        TRAINED if described.adapter else ALL,
    )  # fmt: skip
    return training_state.make_saver(contents, inputs.settings.checkpointing)


def _record_start(inputs: Inputs, parts: Parts, progress: Progress, teacher: dict[str, Any] | None) -> None:
    """Add this start to run.json. A collective: all ranks call it, the reporting rank writes."""
    settings = inputs.settings
    start = run_record.start_of_run(
        parts.bare, inputs.layout, inputs.described, settings.data, inputs.train_set, inputs.valid_set,
        inputs.source, progress.iteration, settings.batch.train_iters,
    )  # fmt: skip
    if teacher:
        start["teacher"] = teacher
    if folder := inputs.reports_to:
        attempt(str(folder / run_record.RUN), lambda: run_record.record(folder, start))


def _make_run(inputs: Inputs, parts: Parts, saver: Any, hooks: list[Hook], sampler: Sampler | None) -> Run:
    batch, logging = inputs.settings.batch, inputs.settings.logging
    sample_interval = logging.sample_interval
    if sample_interval is None and logging.sample_prompts:
        sample_interval = logging.eval_interval
    return Run(
        parts.stepper, inputs.train_set, inputs.valid_set, parts.optimizer, parts.schedule, hooks=hooks,
        saver=saver, train_iters=batch.train_iters, save_interval=inputs.settings.checkpointing.save_interval,
        eval_interval=logging.eval_interval, eval_iters=logging.eval_iters, max_skipped=batch.max_skipped_iters,
        check_replicas_every=inputs.settings.numerics.check_replicas_every, architecture=inputs.described.architecture,
        sampler=sampler, sample_interval=sample_interval,
    )  # fmt: skip


def _train(inputs: Inputs, run: Run, progress: Progress, stop: StopRequest) -> Progress:
    """Train until the last step or a stop request, then write the report. Return the progress made."""
    try:
        return train(run, progress, stop)
    except KeyboardInterrupt:
        log.warning("steps since the last checkpoint are not saved; to save before stopping, send SIGTERM (kill -TERM)")
        raise
    finally:
        if inputs.reports_to and inputs.settings.logging.report:
            write_at_end(inputs.reports_to)


def _log_stop(inputs: Inputs, progress: Progress, done: Progress, stop: StopRequest) -> None:
    """Log why and where the run stopped before its last step, and if it was saved."""
    save_to = Path(inputs.settings.checkpointing.save) if inputs.settings.checkpointing.save else None
    if done.iteration <= progress.iteration:
        where = "nothing new to save"
    else:
        where = f"saved in {save_to}" if save_to else "not saved: --save is not set"
    log.warning(f"{stop.reason} at iteration {done.iteration} of {inputs.settings.batch.train_iters}, {where}")


def _hooks(inputs: Inputs, resolved: str, resumed: bool) -> list[Hook]:
    """Return the hooks of the run (progress, metrics, loggers) on the reporting rank, the only one that has the loss; else []."""
    return list(_make_hooks(inputs, resolved, resumed)) if inputs.layout.is_reporter else []


def _make_hooks(inputs: Inputs, resolved: str, resumed: bool) -> Iterator[Hook]:
    settings, folder = inputs.settings, inputs.folder
    logging = settings.logging
    yield Guarded("the progress on the screen", lambda: make_console(settings.batch.train_iters, logging.log_interval))
    if folder:

        def write_settings() -> None:
            with atomic_file(folder / SETTINGS, "w") as file:
                file.write(resolved)

        yield Guarded(str(folder / METRICS), lambda: MetricsFile(folder))
        if logging.sample_prompts or logging.sample_chats:
            yield Guarded(str(folder / SAMPLES), lambda: SamplesFile(folder))
        attempt(str(folder / SETTINGS), write_settings)
    if board := logging.tensorboard_dir:
        yield Aside(f"TensorBoard in {board}", lambda: TensorBoard(board))
    if logging.wandb_logger:
        values = {k: v for section in settings.sections for k, v in vars(section).items()}
        yield Aside("wandb", lambda: WeightsAndBiases(logging, folder, values, resumed))
