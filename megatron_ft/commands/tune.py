"""megatron-ft tune: from a Hugging Face model and chats to a tuned model, in one command that chooses everything itself."""

from __future__ import annotations

import signal
import sys
import tempfile
from dataclasses import asdict, dataclass, field
from datetime import date
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

from megatron_ft.config.checks import check_settings, rows_fit_positions
from megatron_ft.config.cli import Command, parse, run_script
from megatron_ft.config.settings import TrainingSettings
from megatron_ft.config.steps import one_length
from megatron_ft.errors import ConfigError

if TYPE_CHECKING:
    from megatron_ft.steps.screen import Screen
    from megatron_ft.steps.shell import Shell
    from megatron_ft.tune.choice import Choice
    from megatron_ft.tune.look import Chats, Machine, Model
    from megatron_ft.tune.six import Places, Step


@dataclass
class Tune:
    """Model, chats and result

    Every flag of finetune is a flag too, in place of what would be chosen.
    """

    model: str = field(default="", metadata={"required": True})
    """folder of a Hugging Face model"""
    chats: list[str] = field(default_factory=list, metadata={"required": True})
    """files of chats; every format that pretokenize recognises"""
    output_dir: str | None = field(default=None, metadata={"writes": "folder"})
    """folder for everything that is made, also -o; the same command goes on in it; default: runs/NAME-tuned, NAME that of the model"""
    epochs: float = 3.0
    """train on all chats this many times"""
    lora: bool = False
    """train LoRA adapters instead of the model, and merge them at the end: much less memory"""
    gpus: int | None = None
    """number of GPUs to train on; default: all of this machine, without any its CPU"""
    gpu: str | None = None
    """type of GPU for the planner, as in megatron-ft plan; default: this machine's, for others a100-80gb"""
    chat_format: str | None = None
    """chat format; default: the model's own chat template if it has one, else alfred for Falcon and chatml for others"""
    template_date: str | None = None
    """date that a chat template which asks for one takes for today; default: the day of the first start"""
    dry_run: bool = False
    """print the commands and stop; nothing is written"""
    overwrite: bool = False
    """begin anew in a folder that an earlier tune has made"""


COMMAND = Command(
    name="tune",
    summary="tune a model on your chats: chooses everything, says why, runs the six commands",
    sections=(Tune,),
    examples=(
        "megatron-ft tune models/qwen2.5-0.5b chats.jsonl",
        "megatron-ft tune models/llama2-13b chats.jsonl --lora --gpus 2 --epochs 2 -o runs/mine",
        "megatron-ft tune models/llama2-7b chats.jsonl --lr 1e-5 --seq_length 2048 --gpus 8 --dry_run",
    ),
    positional=("model", "chats"),
    open_flags=True,
    short={"o": "output_dir"},
)
CHOSEN = (
    "load", "save", "data_path", "valid_data_path", "run_dir", "auto_resume", "finetune", "sample_prompts",
    "sample_interval", "nproc_per_node", "nnodes", "node_rank", "master_addr", "master_port", "rehearse",
)  # fmt: skip
"""Flags of finetune that cannot be given: tune's folder decides them."""
START_AGAIN = 75
"""Exit code of a run that was stopped before its end and is saved."""


def run(options: Tune, given: dict[str, Any]) -> int:
    """Look, choose, print, and run what is left to do. given: flags of finetune. Raise UserError."""
    from megatron_ft.steps.shell import CommandFailed

    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))  # as Ctrl-C, so that the started processes are stopped
    if taken := next((name for name in given if name in CHOSEN), None):
        raise ConfigError(f"--{taken} is set by tune itself: leave it out, or use megatron-ft finetune")
    settings = _read(options, given)
    try:
        return _dry(options, given, settings) if options.dry_run else _tune(options, given, settings)
    except CommandFailed as failure:
        if failure.mistake:
            hint = "; --chat_format chatml does without it" if "chat template" in failure.mistake else ""
            raise ConfigError(failure.mistake + hint) from failure
        print(f"\nmegatron-ft tune: a command failed\n{failure}", file=sys.stderr)
        return failure.code if failure.code == START_AGAIN else 1


def _read(options: Tune, given: dict[str, Any]) -> TrainingSettings:
    """Return the settings of finetune with the user's flags. Raise ConfigError for a flag that it does not know."""
    from megatron_ft.tune.six import as_words

    length = {} if "train_iters" in given else {"epochs": options.epochs}
    words = as_words({"load": "-", "data_path": "-", **length, **given})
    command = Command("tune", "", (TrainingSettings,), megatron_flags=True)
    settings: TrainingSettings = parse(command, words)[0]
    one_length(settings.batch)
    return settings


def _dry(options: Tune, given: dict[str, Any], settings: TrainingSettings) -> int:
    """Print the commands. The chats become shards in a temporary folder."""
    from megatron_ft.steps.shell import Shell
    from megatron_ft.tune.look import look_at_machine, look_at_model
    from megatron_ft.tune.run import as_script
    from megatron_ft.tune.six import Places, pretokenize

    model, machine = look_at_model(options.model), look_at_machine(options.gpus, options.gpu, options.dry_run)
    with tempfile.TemporaryDirectory(prefix="megatron_ft-tune-") as scratch:
        there = Places(Path(scratch))
        (format_name, _), dated = _format(options, model), _dated(options, model)
        first = pretokenize(options.chats, options.model, format_name, there, dated)
        Shell(Path(scratch) / "log", {}).run(first.words)
        chats, choice, steps = _plan(options, given, settings, model, machine, there, Places(_folder(options)))
    print(as_script(_saw(model, chats, machine), choice.reasons, steps))
    return 0


def _tune(options: Tune, given: dict[str, Any], settings: TrainingSettings) -> int:
    from megatron_ft.steps.screen import Screen
    from megatron_ft.tune import folder as folders
    from megatron_ft.tune.look import look_at_machine, look_at_model
    from megatron_ft.tune.six import Places

    machine, model = look_at_machine(options.gpus, options.gpu, options.dry_run), look_at_model(options.model)
    folder = _folder(options)
    now = asdict(options) | {"gpus": machine.gpus, "identity": model.identity, **given}
    for name in ("dry_run", "overwrite", "output_dir"):
        del now[name]
    before = folders.begun_with(folder)
    if before is not None and options.overwrite:
        with folders.locked(folder):
            folders.clear(folder)
        before = None
    if before is not None:
        now["template_date"] = now["template_date"] or before.get("template_date")
        folders.check_same(folder, before, now)
    options.template_date = now["template_date"] = now["template_date"] or _date(model)
    screen = Screen(steps=6)
    folders.record(folder, now)
    with folders.locked(folder):
        try:
            try:
                looked = _look(options, given, settings, model, machine, Places(folder), screen)
            except BaseException:
                if before is None:  # a mistake in the command: the next one need not be the same
                    folders.clear(folder)
                raise
            _run(looked, Places(folder), screen)
        except (KeyboardInterrupt, SystemExit) as stop:
            screen.stop_progress()
            print(f"\nmegatron-ft tune: stopped; the same command goes on from here (log: {folder / folders.LOG})")
            return 130 if isinstance(stop, KeyboardInterrupt) else 143
    return 0


class Looked(NamedTuple):
    """What is known before the second command. said: the output of the first one."""

    shell: Shell
    said: str
    saw: dict[str, object]
    choice: Choice
    steps: list[Step]


def _look(
    options: Tune, given: dict[str, Any], settings: TrainingSettings, model: Model, machine: Machine, places: Places,
    screen: Screen,
) -> Looked:  # fmt: skip
    """Make shards of the chats, the first of the commands, and choose."""
    from megatron_ft.steps.shell import Shell
    from megatron_ft.tune import folder as folders
    from megatron_ft.tune.six import pretokenize

    screen.line(
        f"megatron_ft tune: {options.model} learns from {' '.join(options.chats)}, in {places.folder}\n", "bold"
    )
    shell = Shell(places.folder / folders.LOG, {"TOKENIZERS_PARALLELISM": "false"})
    first = pretokenize(options.chats, options.model, _format(options, model)[0], places, _dated(options, model))
    said = shell.run(first.words)
    chats, choice, steps = _plan(options, given, settings, model, machine, places, places)
    return Looked(shell, said, _saw(model, chats, machine), choice, steps)


def _run(looked: Looked, places: Places, screen: Screen) -> None:
    """Print what was chosen, run the commands, and show what has changed."""
    from megatron_ft.tune.run import run_steps, show_answers, show_choice, show_looked

    show_choice(screen, looked.saw, looked.choice.reasons)
    show_looked(screen, looked.steps[0], looked.said)
    run_steps(screen, looked.shell, looked.steps[1:], places, looked.choice)
    show_answers(screen, places)
    screen.line(f"  report    {places['report.html']}")
    screen.line(f"  chat      $ megatron-ft chat {places['hf']}")


def _plan(
    options: Tune, given: dict[str, Any], settings: TrainingSettings, model: Model, machine: Machine, made: Places,
    places: Places,
) -> tuple[Chats, Choice, list[Step]]:  # fmt: skip
    """Return the chats, what is chosen, and the six commands. made: where the shards are. places: where the commands will work."""
    from megatron_ft.tune import six
    from megatron_ft.tune.choose import choose
    from megatron_ft.tune.look import look_at_chats

    name, why = _format(options, model)
    chats = look_at_chats(made.data, options.chats)
    choice = choose(model, chats, machine, given, settings, name, options.epochs, options.lora)
    choice.reasons.insert(0, ("chat_format", name, why))
    training = six.finetune(choice, given, places, machine)
    _check(training, model, machine)
    steps = [
        six.pretokenize(options.chats, options.model, name, places, _dated(options, model)),
        six.convert(options.model, name, places),
        six.ask("before", "base", places, machine),
        training,
        six.ask("after", "tuned", places, machine),
        six.export("lora_rank" in choice.flags, places),
    ]
    return chats, choice, steps


def _check(training: Step, model: Model, machine: Machine) -> None:
    """Raise ConfigError for settings that do not go together or do not fit the model, before anything is started."""
    from megatron_ft.models.architecture import check_layout

    command = Command("tune", "", (TrainingSettings,), megatron_flags=True)
    settings: TrainingSettings = parse(command, training.words[2:])[0]
    check_settings(settings, machine.gpus or int(settings.launching.nproc_per_node or 1))
    rows_fit_positions(settings.data, model.arch.max_position_embeddings)
    parallel = settings.parallel
    check_layout(model.arch, parallel.tensor_model_parallel_size, parallel.pipeline_model_parallel_size)


def _saw(model: Model, chats: Chats, machine: Machine) -> dict[str, object]:
    return {"model": model, "chats": chats, "machine": machine}


def _folder(options: Tune) -> Path:
    return Path(options.output_dir or f"runs/{Path(options.model).resolve().name}-tuned")


def _format(options: Tune, model: Model) -> tuple[str, str]:
    from megatron_ft.tune.choose import chat_format

    return chat_format(model, options.chat_format)


def _date(model: Model) -> str | None:
    """Return today if the model's chat template asks for the date."""
    from megatron_ft.data.template_files import template_sources

    asks = any("strftime_now" in source for source in template_sources(model.folder).values())
    return date.today().isoformat() if asks else None


def _dated(options: Tune, model: Model) -> list[str]:
    if _format(options, model)[0] != "tokenizer":
        return []
    day = options.template_date or _date(model)
    return ["--template_date", day] if day else []


if __name__ == "__main__":
    sys.exit(run_script(COMMAND, run))
