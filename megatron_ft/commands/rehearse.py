"""finetune --rehearse: look at what the command names, then run the same command small, with the same processes, on this machine.

The small run is `finetune` itself with shrunk settings, so that everything a launch script can get wrong (names, numbers of processes,
who finds whom, places to write) is met before there are nodes. Nothing is written where the real run would write; on several machines
the small run lives in a hidden folder beside that, since they share no other place.
"""

from __future__ import annotations

import os
import shutil
import tempfile
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import TypeVar

from megatron_ft.checkpoints.folder import TOKENIZER_FOLDER, CheckpointConfig
from megatron_ft.config.checks import check_settings, data_parallel_size, places_to_write
from megatron_ft.config.sections import Launching
from megatron_ft.config.settings import TrainingSettings
from megatron_ft.errors import ConfigError, UserError
from megatron_ft.files import check_writable
from megatron_ft.launch.places import Places, is_rank, places
from megatron_ft.models.architecture import Architecture, padded_vocab_size
from megatron_ft.rehearsal import make_up, shrink
from megatron_ft.rehearsal.meeting import AT_ONCE, BY_HAND, Meeting, shared_place

T = TypeVar("T")
VARIABLE, MODEL_VARIABLE = "MEGATRON_FT_REHEARSE", "MEGATRON_FT_MAKE_BELIEVE"
"""As --rehearse and --make_believe, for a launch script that is not to be touched."""


def wanted(launching: Launching) -> bool:
    return launching.rehearse or os.environ.get(VARIABLE, "0") not in ("", "0")


def rehearse(settings: TrainingSettings, run: Callable[[TrainingSettings], int]) -> int:
    """settings: of the real command; run: finetune's own. Returns its exit code, 2 where something it names is missing."""
    os.environ.update({"MEGATRON_FT_DEVICE": "cpu", "WANDB_MODE": "offline", "WANDB_SILENT": "true", VARIABLE: "0"})
    os.environ.setdefault("OMP_NUM_THREADS", "1")
    started, was_rank = time.monotonic(), is_rank()
    here = None if was_rank else _processes(settings)
    real = here.world_size if here else int(os.environ["WORLD_SIZE"])
    alone = here is not None and "SLURM_PROCID" not in os.environ
    speaks = os.environ.get("RANK") == "0" if here is None else alone or here.node == 0
    say = print if speaks else (lambda *_, **__: None)
    say(
        f"rehearsal on this machine's CPU, {real} processes asked for; nothing is written where the real run writes",
        flush=True,
    )

    meeting = None if alone else _meet(lambda: _meeting(settings, here))
    folder = meeting.folder if meeting else Path(tempfile.mkdtemp(prefix="megatron_ft-rehearsal-"))
    scratch = Path(tempfile.mkdtemp(prefix="megatron_ft-rehearsal-")) if meeting else folder
    before = os.environ.get("TMPDIR"), tempfile.tempdir
    # Where wandb and the launcher leave something: on this machine, since sockets are not for shared folders.
    os.environ["TMPDIR"] = tempfile.tempdir = str(scratch)
    try:
        if meeting:
            _meet(meeting.begin)
        found = _look(settings, real, say)
        dp = data_parallel_size(settings.parallel, real)
        dp = shrink.data_parallel(settings.parallel, real) if alone else dp
        count = real // data_parallel_size(settings.parallel, real) * dp
        small = _shrunk(settings, found, folder, dp, count if alone else None)
        if speaks:
            _prepare(folder, found, small)
            changed = shrink.changes(found.model.architecture, found.small, settings, small, (real, count))
            say(f"  shrunk         {', '.join(map(str, changed))}", flush=True)
            if meeting:
                meeting.open()
        elif meeting:
            _meet(meeting.wait)
        code = run(small)
        if is_rank() and not was_rank:
            return code  # one of the processes; the launcher goes on below
        say(_verdict(code, count, settings, time.monotonic() - started), flush=True)
        return code
    finally:
        if is_rank() == was_rank:
            shutil.rmtree(scratch, ignore_errors=True)
            _temporary(*before)
            if speaks and meeting:
                meeting.end()


def _temporary(variable: str | None, folder: str | None) -> None:
    tempfile.tempdir = folder
    if variable is None:
        del os.environ["TMPDIR"]
    else:
        os.environ["TMPDIR"] = variable


def _look(settings: TrainingSettings, real: int, say: Callable[..., None]) -> _Findings:
    """Tell what there is. Raises ConfigError where something is missing."""
    found = _Findings(settings, real, settings.launching.make_believe or os.environ.get(MODEL_VARIABLE))
    for line in found.lines:
        say(f"  {line}", flush=True)
    if found.missing:
        raise ConfigError(
            f"{'; '.join(found.missing)}: correct the command, or let the rehearsal make up what is not there yet with --make_believe MODEL"
        )
    return found


def _processes(settings: TrainingSettings) -> Places:
    """As the command says; where it does not, one for each part of the model."""
    launching = settings.launching
    here = replace(launching, nproc_per_node=launching.nproc_per_node or settings.parallel.model_parallel_size)
    if "SLURM_PROCID" not in os.environ:  # alone: the other machines are not there to be found
        here = replace(here, master_addr=here.master_addr or "localhost", master_port=here.master_port or 1)
    return places(here)


class _Findings:
    """What the real command would meet, as far as this machine can tell. lines: to print; missing: what stops a rehearsal."""

    small: Architecture
    """Of the model to rehearse with, where a model was found."""

    def __init__(self, settings: TrainingSettings, processes: int, make_believe: str | None):
        self.lines: list[str] = []
        self.missing: list[str] = []
        self.settings, self.processes = settings, processes
        self.imagined = _imagined(make_believe) if make_believe else None
        self.source: Path | None = None
        self.described: CheckpointConfig | None = None
        self.made_up_data: list[str] = []
        for look in (self._settings, self._load, self._vocabulary, self._data, self._places):
            if self.missing and look in (self._load, self._data):
                continue  # what wrong settings mean for a model and for rows cannot be computed
            try:
                look()
            except UserError as error:
                self.missing.append(" ".join(str(error).split()))
        if self.described:
            self.small = shrink.architecture(self.described.architecture, settings.parallel)

    @property
    def model(self) -> CheckpointConfig:
        """The description of the model, where nothing is missing."""
        assert self.described is not None
        return self.described

    def _note(self, what: str, text: str) -> None:
        self.lines.append(f"{what:14} {text}")

    def _settings(self) -> None:
        s = self.settings
        check_settings(s, self.processes)
        dp = data_parallel_size(s.parallel, self.processes)
        tp, pp = s.parallel.tensor_model_parallel_size, s.parallel.pipeline_model_parallel_size
        self._note("settings", f"TP{tp} x PP{pp} x DP{dp}, fit each other")

    def _load(self) -> None:
        from megatron_ft.training.fit import check_model, find_start

        s, flags = self.settings, self.settings.model
        if flags.vocab_file and not Path(flags.vocab_file).exists():  # _vocabulary tells of it
            s = replace(s, model=replace(flags, vocab_file=None))
        load = Path(s.checkpointing.load)
        if self.imagined is not None and not load.exists():
            self.described = check_model(s, self.imagined, load, self.processes)
            self._note("--load", f"{load}: NOT THERE, made up")
            return
        start = find_start(s, self.processes)
        self.source, self.described = start.folder, start.described
        kind, iteration = start.described.ckpt_format, start.described.iteration
        self._note("--load", f"{start.folder}: {kind}, iteration {iteration}, its files are there")

    def _vocabulary(self) -> None:
        file = self.settings.model.vocab_file
        if file and Path(file).exists():
            self._note("--vocab_file", f"{file}: read")
        elif file and self.imagined is not None:
            self._note("--vocab_file", f"{file}: NOT THERE, left out")
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
        if gone and self.imagined is not None:
            self.made_up_data = gone
            self._note("--data_path", f"{', '.join(gone)}: NOT THERE, made up")
            return
        train, valid = datasets.make_datasets(replace(data, verify_data=False), self.described)
        more = f", {valid.num_samples:,} to validate" if valid else ""
        self._note(
            "--data_path",
            f"{train.num_samples:,} samples in {len(train.epoch_rows(0)):,} rows{more}; opened, not hashed",
        )

    def _places(self) -> None:
        s = self.settings
        for flag, place in places_to_write(s).items():
            self._note(flag, f"{place}: {check_writable(flag, place)}")


def _imagined(model: str) -> CheckpointConfig:
    """A checkpoint of this model, as if it had been converted."""
    from megatron_ft.planner import known

    arch: Architecture = known.architecture(model)
    return CheckpointConfig(arch, "torch_dist", 1, 1, arch.vocab_size, "release", "bf16")


def _meeting(settings: TrainingSettings, here: Places | None) -> Meeting:
    """Of several launchers, or (here is None) of ranks that something else has started: in a folder that all of them can name."""
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
    """As far as the environment tells; where it does not, yes."""
    if here:
        return here.nodes > 1
    if "LOCAL_WORLD_SIZE" in os.environ:
        return os.environ["LOCAL_WORLD_SIZE"] != os.environ["WORLD_SIZE"]
    if "SLURM_STEP_NUM_NODES" in os.environ:
        return os.environ["SLURM_STEP_NUM_NODES"] != "1"
    return os.environ["MASTER_ADDR"] not in ("localhost", "127.0.0.1", "::1")


def _meet(step: Callable[[], T]) -> T:
    """Of the ranks of one machine, the first alone says what went wrong."""
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
    if found.made_up_data:
        data = replace(data, data_path=[str(folder / "data" / "made_up-train")], valid_data_path=[], data_weights=[])
    return replace(
        settings,
        checkpointing=shrink.checkpointing(settings.checkpointing, folder / "model", folder / "save"),
        data=data, batch=shrink.batch(settings.batch, parallel, dp), parallel=parallel,
        optimizer=shrink.optimizer(settings.optimizer), numerics=shrink.numerics(settings.numerics),
        logging=shrink.logging(settings.logging, folder), model=shrink.model(settings.model),
        launching=shrink.launching(settings.launching, processes, folder), stopping=shrink.stopping(settings.stopping),
    )  # fmt: skip


def _prepare(folder: Path, found: _Findings, small: TrainingSettings) -> None:
    """The small checkpoint and, where asked for, shards."""
    described = found.model
    os.environ.setdefault("WANDB_DIR", str(folder))
    if found.made_up_data:
        for kind in ("train", "val"):
            make_up.shards(folder / "data" / f"made_up-{kind}", found.small.vocab_size, described.tokenizer)
    dtype = "bf16" if small.numerics.bf16 else "fp32"
    made_up = replace(
        described, architecture=found.small, ckpt_format="torch_dist", tensor_model_parallel_size=1, pipeline_model_parallel_size=1,
        padded_vocab_size=padded_vocab_size(found.small.vocab_size, 1), iteration="release", dtype=dtype,
    )  # fmt: skip
    make_up.model(folder / "model", made_up, found.source / TOKENIZER_FOLDER if found.source else None)


def _verdict(code: int, processes: int, settings: TrainingSettings, seconds: float) -> str:
    spent = f"{int(seconds) // 60}:{int(seconds) % 60:02d}"
    if code:
        return f"rehearsal FAILED with exit code {code} after {spent}"
    saved = ", saved and" if settings.checkpointing.save else ","
    return f"rehearsal passed in {spent}: {processes} processes found each other, loaded, trained{saved} ended; it is all removed again"
