"""Megatron-LM and Megatron-LLM: the flags of a training command, by the table of config/megatron_flags.py."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import Any

from megatron_ft.config import translate
from megatron_ft.config.command import Command
from megatron_ft.config.expected import Model
from megatron_ft.config.fields import Option, default_of, options_of
from megatron_ft.config.flags import read_flags
from megatron_ft.config.hints import suggestion
from megatron_ft.config.megatron_flags import MEANS, SAME, Given, accepted, find, foreign, refusal
from megatron_ft.config.settings import TrainingSettings
from megatron_ft.config.values import from_text
from megatron_ft.errors import ConfigError
from megatron_ft.importing.job import Job, flag_text
from megatron_ft.importing.shell_words import shown, unknowns

COMMAND = Command("finetune", "", (TrainingSettings,), megatron_flags=True)
DEFAULTS = {"hidden_dropout": "0.1", "attention_dropout": "0.1", "lr_decay_style": "linear"}
"""Flags whose default there changes the training, and is another one here."""
LAUNCHER = {"nproc_per_node": "nproc_per_node", "nproc-per-node": "nproc_per_node", "nnodes": "nnodes"}


def job_of(words: list[str]) -> Job:
    """Return the job of the words behind the program. Unknown values in them are marked (shell_words.py)."""
    job = Job("Megatron", "--")
    options = options_of((TrainingSettings,))
    kept: list[str] = []
    for name, texts in _flags(words):
        _one(job, name, texts, options, kept)
    given = read_flags(COMMAND, options, kept)
    values: dict[str, Any] = {}
    for name, text in given.values.items():
        try:
            values[name] = text if isinstance(text, bool) else from_text(options[name], text, f"--{name}")
        except ConfigError as error:
            job.refuse(name, text, str(error))
    _take(job, values, options)
    _translate(job, values, given.megatron, options)
    return job


def _flags(words: list[str]) -> Iterator[tuple[str, list[str]]]:
    """Yield each flag with its values. Words in front of the first flag, and behind a switch, have no name: ""."""
    name = ""
    values: list[str] = []
    for word in words:
        if word.startswith("--") and len(word) > 2:
            if name or values:
                yield name, values
            name, equals, text = word[2:].partition("=")
            name, values = name.replace("-", "_"), [text] if equals else []
        else:
            values.append(word)
    if name or values:
        yield name, values


def _one(job: Job, name: str, values: list[str], options: dict[str, Option], kept: list[str]) -> None:
    """Give a flag to the parser of finetune, or say what becomes of it."""
    if stray := _stray(name, values, options):
        job.before.append(f"{' '.join(stray)} has no value in the script, so its flags are not known")
        values = values[: len(values) - len(stray)]
    if not name:
        return
    shown_values = [shown(one) for one in values]
    ours = SAME.get(name, name)
    if ours in _names(options) or name in MEANS:
        if any(unknowns(one) for one in values) and not _is_text(options.get(ours)):
            job.before.append(
                f"--{name} {' '.join(shown_values)}: the script does not say the number: add --{ours}, or import with --set"
            )
            return
        kept += [f"--{name}", *shown_values] if len(values) != 1 else [f"--{name}={shown_values[0]}"]
    elif why := refusal(name, shown_values[0] if shown_values else None):
        job.refuse(name, shown_values, why)
    elif flag := find(name):
        if (
            flag.fate == "computed"
            and any(unknowns(one) for one in values)
            and "checkpoint" not in name
            and name != "tokenizer_model"
        ):
            job.before.append(
                f"--{name} {' '.join(shown_values)}: the script does not say the number: import with --set"
            )
        elif flag.fate == "computed":
            kept += [f"--{name}", *shown_values]
        else:
            job.ignore(name, shown_values, flag.reason)
    else:
        similar = suggestion(name, [*options, *accepted()], "--")
        job.refuse(name, shown_values, f"neither Megatron nor finetune has it, as far as is known{similar}")


def _names(options: dict[str, Option]) -> set[str]:
    return {*options, *(f"no_{name}" for name, option in options.items() if option.is_switch)}


def _is_text(option: Option | None) -> bool:
    return option is not None and (option.bare_type is str or option.bare_type == list[str])


def _stray(name: str, values: list[str], options: dict[str, Option]) -> list[str]:
    """Return unknown words at the end that no flag takes: `$EXTRA_ARGS` of a script that does not set it."""
    option = options.get(SAME.get(name, name))
    foreign_one = find(name)
    takes = 0 if not name or name in MEANS or name.startswith("no_") else 1
    if option:
        takes = 0 if option.is_switch else len(values) if option.is_list else 1
    elif foreign_one and foreign_one.fate != "refused":
        takes = {"": 0, "=": 1, "*": len(values)}[foreign_one.arity]
    return [shown(one) for one in values[takes:] if unknowns(one)]


def _take(job: Job, values: dict[str, Any], options: dict[str, Option]) -> None:
    """Take the flags that mean the same here."""
    for name, value in values.items():
        job.finetune[name] = value
        compared = options[name].section is Model
        ours = f"compared with the checkpoint: {flag_text(name, value)}" if compared else flag_text(name, value)
        job.take(f"no_{name}" if value is False else name, value if not isinstance(value, bool) else [], ours)
    for name, text in DEFAULTS.items():
        if name not in values:
            job.defaults |= {name}
            job.set(name, text, name, from_text(options[name], text, f"--{name}"))


def _translate(job: Job, values: dict[str, Any], given: dict[str, Given], options: dict[str, Option]) -> None:
    """Take the flags from which ours are computed, one after the other, since one may be wrong."""
    every = {name: default_of(option) for name, option in options.items() if not option.required} | values
    levels = dict.fromkeys(values, 2)
    order = [name for name in translate.COMPUTED_ORDER if name in given]
    good: dict[str, Given] = {}
    found: dict[str, Any] = {}
    for name in [None, *order]:
        trial = good | ({name: given[name]} if name else {})
        try:
            with _quiet():
                computed = translate.apply(trial, dict(every), levels)
        except ConfigError as error:
            job.refuse(name or "", given[name].value if name else "", str(error))
            continue
        new = {ours: value for ours, value in computed.items() if found.get(ours) != value}
        if name and new:
            job.take(name, given[name].value, ", ".join(flag_text(ours, value) for ours, value in new.items()))
        elif name:
            job.ignore(name, given[name].value, foreign()[name].reason)
        good, found = trial, computed
    job.finetune |= found


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    before, translate.log.disabled = translate.log.disabled, True
    try:
        yield
    finally:
        translate.log.disabled = before
