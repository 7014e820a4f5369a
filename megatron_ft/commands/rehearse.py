"""finetune --rehearse: check the paths of the command, then run it with a small model on CPU, with the same processes.

The small run is `finetune` itself with shrunk settings. It finds the mistakes of a launch script (names, numbers of processes,
addresses, folders to write to) before GPUs are allocated. Nothing is written where the real run would write. On several machines the
small run uses a hidden folder beside that, because they share no other folder.
"""

from __future__ import annotations

import os
import shutil
import tempfile
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, TypeVar

from megatron_ft.checkpoints.folder import TOKENIZER_FOLDER, CheckpointConfig
from megatron_ft.config.checks import check_settings, data_parallel_size, places_to_write
from megatron_ft.config.sections import Launching
from megatron_ft.config.settings import TrainingSettings
from megatron_ft.device import choose_cpu
from megatron_ft.errors import ConfigError, UserError
from megatron_ft.files import check_writable
from megatron_ft.generation.prompts import read_references
from megatron_ft.launch.places import Places, is_rank, places
from megatron_ft.models.architecture import Architecture, padded_vocab_size
from megatron_ft.rehearsal import make_up, shrink
from megatron_ft.rehearsal.meeting import AT_ONCE, BY_HAND, Meeting, shared_place
from megatron_ft.wording import counted

if TYPE_CHECKING:
    from megatron_ft.training.adapting import Adapting
    from megatron_ft.training.teacher import Teacher

T = TypeVar("T")
VARIABLE, MODEL_VARIABLE = "MEGATRON_FT_REHEARSE", "MEGATRON_FT_MAKE_BELIEVE"
"""Environment variables with the effect of --rehearse and --make_believe, for a launch script that should not be edited."""


def requested(launching: Launching) -> bool:
    return launching.rehearse or os.environ.get(VARIABLE, "0") not in ("", "0")


def rehearse(settings: TrainingSettings, run: Callable[[TrainingSettings], int]) -> int:
    """Rehearse and return the exit code of the small run. settings: of the real command. run: finetune's. Raise UserError."""
    choose_cpu()
    os.environ.update({"WANDB_MODE": "offline", "WANDB_SILENT": "true", VARIABLE: "0"})
    began, was_rank = time.monotonic(), is_rank()
    here = None if was_rank else _processes(settings)
    real = here.world_size if here else int(os.environ["WORLD_SIZE"])
    alone = here is not None and "SLURM_PROCID" not in os.environ
    prints = os.environ.get("RANK") == "0" if here is None else alone or here.node == 0
    say = print if prints else (lambda *_, **__: None)
    say(
        f"rehearsal on this machine's CPU, {counted(real, 'process')} in the real run; nothing is written where the real run writes",
        flush=True,
    )

    meeting = None if alone else _meet(lambda: _meeting(settings, here))
    folder = meeting.folder if meeting else Path(tempfile.mkdtemp(prefix="megatron_ft-rehearsal-"))
    scratch = Path(tempfile.mkdtemp(prefix="megatron_ft-rehearsal-")) if meeting else folder
    before = os.environ.get("TMPDIR"), tempfile.tempdir
    # Temporary files of wandb and the launcher: on this machine, because a shared folder cannot hold sockets.
    os.environ["TMPDIR"] = tempfile.tempdir = str(scratch)
    try:
        if meeting:
            _meet(meeting.begin)
        found = _check_paths(settings, real, say)
        dp = data_parallel_size(settings.parallel, real)
        dp = shrink.data_parallel(settings.parallel, real) if alone else dp
        count = real // data_parallel_size(settings.parallel, real) * dp
        small = _shrunk(settings, found, folder, dp, count if alone else None)
        if prints:
            _prepare(folder, found, small)
            changed = shrink.changes(found.model.architecture, found.small, settings, small, (real, count))
            say(f"  shrunk         {', '.join(map(str, changed))}", flush=True)
            if meeting:
                meeting.open()
        elif meeting:
            _meet(meeting.wait)
        code = run(small)
        if is_rank() and not was_rank:
            return code  # one of the processes; the launcher continues below
        say(_verdict(code, count, settings, time.monotonic() - began), flush=True)
        return code
    finally:
        if is_rank() == was_rank:
            shutil.rmtree(scratch, ignore_errors=True)
            _temporary(*before)
            if prints and meeting:
                meeting.end()


def _temporary(variable: str | None, folder: str | None) -> None:
    tempfile.tempdir = folder
    if variable is None:
        del os.environ["TMPDIR"]
    else:
        os.environ["TMPDIR"] = variable


def _check_paths(settings: TrainingSettings, real: int, say: Callable[..., None]) -> _Findings:
    """Print what the command would use. Raise ConfigError if something is missing."""
    found = _Findings(settings, real, settings.launching.make_believe or os.environ.get(MODEL_VARIABLE))
    for line in found.lines:
        say(f"  {line}", flush=True)
    if found.missing:
        raise ConfigError(
            f"{'; '.join(found.missing)}: correct the command, or add --make_believe MODEL, which generates what does not exist yet"
        )
    return found


def _processes(settings: TrainingSettings) -> Places:
    """Return the processes of the command; without --nproc_per_node one for each part of the model."""
    launching = settings.launching
    here = replace(launching, nproc_per_node=launching.nproc_per_node or settings.parallel.model_parallel_size)
    if "SLURM_PROCID" not in os.environ:  # the other machines do not take part
        here = replace(here, master_addr=here.master_addr or "localhost", master_port=here.master_port or 1)
    return places(here)


class _Findings:
    """Checks of what the real command would use, on this machine. lines: to print. missing: the reasons not to rehearse."""

    small: Architecture
    """Of the model to rehearse with, where a model was found."""
    adapting: Adapting | None = None
    """The adapters of the real run, if it has any."""
    teacher: Teacher | None = None
    """The resident teacher of the real run, if it has one."""

    def __init__(self, settings: TrainingSettings, processes: int, make_believe: str | None):
        self.lines: list[str] = []
        self.missing: list[str] = []
        self.settings, self.processes = settings, processes
        self.stand_in = _stand_in(make_believe) if make_believe else None
        self.source: Path | None = None
        self.described: CheckpointConfig | None = None
        self.generated_data: list[str] = []
        for check in (self._settings, self._load, self._vocabulary, self._data, self._places):
            if self.missing and check in (self._load, self._data):
                continue  # the effect of wrong settings on a model and on rows cannot be computed
            try:
                check()
            except UserError as error:
                self.missing.append(" ".join(str(error).split()))
        if self.described:
            self.small = shrink.architecture(self.described.architecture, settings.parallel, self.nf4)

    @property
    def model(self) -> CheckpointConfig:
        """The description of the model, where nothing is missing."""
        assert self.described is not None
        return self.described

    @property
    def small_teacher(self) -> Architecture:
        """The teacher to rehearse with: of the real one's kind, with the layers of the small model."""
        if self.teacher is None:
            return self.small
        arch = self.teacher.described.architecture.with_layers(self.model.architecture.num_layers)
        return shrink.architecture(arch, self.settings.parallel)

    @property
    def nf4(self) -> bool:
        """Whether the run's adapters are on a quantised base."""
        return self.adapting is not None and (self.adapting.nf4 or self.adapting.described.quantization is not None)

    def _note(self, what: str, text: str) -> None:
        self.lines.append(f"{what:14} {text}")

    def _settings(self) -> None:
        s = self.settings
        check_settings(s, self.processes)
        if asked := s.logging.sample_prompts:
            read_references(Path(asked))
        dp = data_parallel_size(s.parallel, self.processes)
        tp, pp, cp = s.parallel.model_parallel_sizes
        self._note("settings", f"TP{tp} x PP{pp}{f' x CP{cp}' if cp > 1 else ''} x DP{dp}, consistent")

    def _load(self) -> None:
        from megatron_ft.training.adapting import find_adapting
        from megatron_ft.training.fit import check_model, find_start, starts_anew

        s, flags = self.settings, self.settings.model
        if flags.vocab_file and not Path(flags.vocab_file).exists():  # _vocabulary reports it
            s = replace(s, model=replace(flags, vocab_file=None))
        load = Path(s.checkpointing.load)
        if self.stand_in is not None and not load.exists():
            made_up = replace(
                s, adapters=shrink.unknown_adapters(s.adapters), distillation=shrink.unknown_teacher(s.distillation)
            )
            self.described = check_model(made_up, self.stand_in, load, self.processes)
            self.adapting = find_adapting(made_up, self.described, load, starts_anew=True)
            self._note("--load", f"{load}: MISSING, generated")
            self._note_adapters()
            self._note_teacher(made_up)
            return
        start = find_start(s, self.processes)
        self.source, self.described = start.folder, start.described
        anew = starts_anew(start.described, start.settings.checkpointing)
        self.adapting = find_adapting(start.settings, start.described, start.folder, anew)
        kind, iteration = start.described.ckpt_format, start.described.iteration
        self._note("--load", f"{start.folder}: {kind}, iteration {iteration}, all files exist")
        self._note_adapters()
        self._note_teacher(start.settings)

    def _note_teacher(self, settings: TrainingSettings) -> None:
        from megatron_ft.training.teacher import find_teacher

        self.teacher = find_teacher(settings, self.model)
        if self.teacher:
            arch = self.teacher.described.architecture
            self._note(
                "--teacher", f"{self.teacher.folder}: {arch.family}, layers {self.teacher.split}, all files exist"
            )
        elif self.settings.distillation.teacher:
            self._note("--teacher", f"{self.settings.distillation.teacher}: MISSING, generated")

    def _note_adapters(self) -> None:
        if self.adapting:
            base = "NF4" if self.nf4 else "full precision"
            self._note("adapters", f"rank {self.adapting.lora.rank}, on a base in {base}")

    def _vocabulary(self) -> None:
        file = self.settings.model.vocab_file
        if file and Path(file).exists():
            self._note("--vocab_file", f"{file}: read")
        elif file and self.stand_in is not None:
            self._note("--vocab_file", f"{file}: MISSING, not compared")
        elif file:
            raise ConfigError(f"--vocab_file {file}: no such file")

    def _data(self) -> None:
        from megatron_ft.training import datasets

        data = self.settings.data
        if self.described is None:
            return
        gone = [
            prefix
            for prefix in data.data_path
            if not Path(f"{prefix}-text.idx").exists() and not Path(f"{prefix}.idx").exists()
        ]
        if gone and self.stand_in is not None:
            self.generated_data = gone
            self._note("--data_path", f"{', '.join(gone)}: MISSING, generated")
            return
        train, valid = datasets.make_datasets(
            replace(data, verify_data=False), self.described, self.settings.distillation
        )
        more = f", {valid.num_samples:,} to validate" if valid else ""
        self._note(
            "--data_path",
            f"{counted(train.num_samples, 'sample')} in {counted(len(train.epoch_rows(0)), 'row')}{more}; opened, not hashed",
        )

    def _places(self) -> None:
        s = self.settings
        for flag, place in places_to_write(s).items():
            self._note(flag, f"{place}: {check_writable(flag, place)}")


def _stand_in(model: str) -> CheckpointConfig:
    """Return the description of a converted checkpoint of this model."""
    from megatron_ft.planner import known

    arch: Architecture = known.architecture(model)
    return CheckpointConfig(arch, "torch_dist", 1, 1, arch.vocab_size, "release", "bf16")


def _meeting(settings: TrainingSettings, here: Places | None) -> Meeting:
    """Return the meeting of several launchers, or (here is None) of ranks that another launcher started."""
    job = os.environ.get("SLURM_JOB_ID", os.environ.get("TORCHELASTIC_RUN_ID", "none"))
    port = here.port if here else os.environ["MASTER_PORT"]
    number, processes = (here.node, here.nodes) if here else (int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"]))
    flag, place = "--save", Path(tempfile.gettempdir())
    if _several_machines(here):
        flag, place = shared_place(places_to_write(settings))
    return Meeting(
        place / f".megatron_ft-rehearsal-{os.getuid()}-{job}-{port}",
        number, processes, here.address if here else os.environ["MASTER_ADDR"], flag,
        AT_ONCE if "SLURM_PROCID" in os.environ else BY_HAND,
    )  # fmt: skip


def _several_machines(here: Places | None) -> bool:
    """Return if several machines take part, from the environment; True if it cannot be determined."""
    if here:
        return here.nodes > 1
    if "LOCAL_WORLD_SIZE" in os.environ:
        return os.environ["LOCAL_WORLD_SIZE"] != os.environ["WORLD_SIZE"]
    if "SLURM_STEP_NUM_NODES" in os.environ:
        return os.environ["SLURM_STEP_NUM_NODES"] != "1"
    return os.environ["MASTER_ADDR"] not in ("localhost", "127.0.0.1", "::1")


def _meet(step: Callable[[], T]) -> T:
    """Run a step; on an error only the first rank of a machine prints it."""
    try:
        return step()
    except UserError as error:
        if os.environ.get("LOCAL_RANK", "0") != "0":
            raise SystemExit(error.exit_code) from None
        raise


def _shrunk(
    settings: TrainingSettings, found: _Findings, folder: Path, dp: int, processes: int | None
) -> TrainingSettings:
    parallel = shrink.parallelism(found.model.architecture, settings.parallel)
    data = replace(settings.data, seq_length=shrink.seq_length(settings.data, parallel), verify_data=False)
    replicas = dp * settings.parallel.context_parallel_size
    if found.generated_data:
        data = replace(
            data,
            data_path=[str(folder / "data" / "made_up-train")],
            valid_data_path=[],
            data_weights=[],
            data_type=None,
            split=None,
        )
    return replace(
        settings,
        checkpointing=shrink.checkpointing(settings.checkpointing, folder / "model", folder / "save"),
        data=data, batch=shrink.batch(settings.batch, parallel, replicas), parallel=parallel,
        optimizer=shrink.optimizer(settings.optimizer), numerics=shrink.numerics(settings.numerics),
        logging=shrink.logging(settings.logging, folder), model=shrink.model(settings.model),
        launching=shrink.launching(settings.launching, processes, folder), stopping=shrink.stopping(settings.stopping),
        adapters=shrink.adapters(found.adapting.lora, found.nf4) if found.adapting else settings.adapters,
        distillation=shrink.distillation(settings.distillation, folder / "teacher"),
    )  # fmt: skip


def _prepare(folder: Path, found: _Findings, small: TrainingSettings) -> None:
    """Write the small checkpoint and, if the data is missing, shards."""
    described = found.model
    os.environ.setdefault("WANDB_DIR", str(folder))
    if found.generated_data:
        for kind in ("train", "val"):
            make_up.shards(folder / "data" / f"made_up-{kind}", found.small.vocab_size, described.tokenizer)
    dtype = "bf16" if small.numerics.bf16 else "fp32"
    made_up = replace(
        described, architecture=found.small, ckpt_format="torch_dist", tensor_model_parallel_size=1, pipeline_model_parallel_size=1,
        padded_vocab_size=padded_vocab_size(found.small.vocab_size, 1), iteration="release", dtype=dtype, adapter=None,
        quantization=None,
    )  # fmt: skip
    make_up.model(folder / "model", made_up, found.source / TOKENIZER_FOLDER if found.source else None)
    if small.distillation.teacher:
        make_up.model(folder / "teacher", replace(made_up, architecture=found.small_teacher), None)


def _verdict(code: int, processes: int, settings: TrainingSettings, seconds: float) -> str:
    spent = f"{int(seconds) // 60}:{int(seconds) % 60:02d}"
    if code:
        return f"rehearsal FAILED with exit code {code} after {spent}"
    saved = ", saved and" if settings.checkpointing.save else ","
    return f"rehearsal passed in {spent}: {counted(processes, 'process')} connected, loaded, trained{saved} ended; its files are removed"
