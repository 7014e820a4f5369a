"""Prepares a command line for argparse, which does not support some common spellings.

These are `-` for `_`, a suggestion for an unknown flag, `--switch=false`, negative numbers such as -1e-5 as values, and, for commands
with open flags, unknown flags that are collected as settings.
"""

import re
from typing import Any

from megatron_ft.config.fields import Option
from megatron_ft.config.hints import Wrong, refused_names, suggestion
from megatron_ft.config.megatron_flags import MEANS, SAME, Foreign, Given, accepted, find, refusal
from megatron_ft.config.renamed import current
from megatron_ft.config.values import unquoted
from megatron_ft.errors import ConfigError

_FLAG = re.compile(r"(--?)([A-Za-z][\w.-]*)(?:=(.*))?", re.DOTALL)
_NEGATIVE = re.compile(r"-\.?\d.*")
_TRUTH = {"true": True, "yes": True, "on": True, "1": True, "false": False, "no": False, "off": False, "0": False}
OWN_FLAGS = ("config", "print_config", "help")


def switch_flags(option: Option, options: dict[str, Option]) -> list[str]:
    """Return `--x` and `--no_x` for a bool field x; for a field with the name no_x only that flag."""
    negated = f"no_{option.name}"
    return [option.name] if option.name.startswith("no_") or negated in options else [option.name, negated]


def ready(
    argv: list[str],
    options: dict[str, Option],
    others: dict[str, Any] | None,
    megatron: dict[str, Given] | None = None,
) -> list[str]:
    """Return argv in the form that argparse expects.

    others: receives unknown flags; None: raise ConfigError, which names all of them. megatron: receives flags of Megatron that are not
    ours; None: they are unknown.
    """
    switches = {
        flag: option for option in options.values() if option.is_switch for flag in switch_flags(option, options)
    }
    known = {*options, *switches, *OWN_FLAGS}
    done: list[str] = []
    wrong: list[Wrong] = []
    rest = list(argv)
    while rest and rest[0] != "--":
        token = rest.pop(0)
        match = _FLAG.fullmatch(token)
        if not match or token == "-h":
            done.append(token)
            continue
        dashes, inline = match[1], match[3]
        name = current(match[2].replace("-", "_"), known, "--") if dashes == "--" else match[2]
        if megatron is not None and name not in known:
            name = SAME.get(name, name)
        if name in known and dashes == "--":
            done.append(_known_flag(name, inline, rest, options, switches))
        elif megatron is not None and name in MEANS and dashes == "--":
            done += _meaning(name, inline)
        elif megatron is not None and dashes == "--" and (flag := find(name)):
            wrong += _foreign(name, flag, inline, rest, megatron)
        elif others is None or dashes == "-":
            similar = known if megatron is None else {*known, *accepted()}
            wrong.append(Wrong(dashes + match[2], suggestion(name, similar, "--")))
            _values(rest)
        else:
            _collect(name, inline, rest, others)
    if wrong:
        raise ConfigError(refused_names("flag", wrong))
    return done + rest


def _meaning(name: str, inline: str | None) -> list[str]:
    """Return our flag for a switch of Megatron."""
    ours, value = MEANS[name]
    if inline is not None and not _truth(name, inline):
        return []
    return [f"--{ours}"] if value is True else [f"--{ours}={value}"]


def _foreign(name: str, known: Foreign, inline: str | None, rest: list[str], megatron: dict[str, Given]) -> list[Wrong]:
    """Read a flag of Megatron that is not ours, with its values. Return what is wrong with it."""
    value: Any = _values(rest) if known.arity == "*" or known.fate == "refused" else True
    if inline is not None:
        value = inline
    elif known.arity == "=":
        if not rest or (_FLAG.fullmatch(rest[0]) and not _NEGATIVE.fullmatch(rest[0])):
            raise ConfigError(f"--{name}: expected one argument; see --help")
        value = rest.pop(0)
    value = unquoted(value) if isinstance(value, str) else value
    if why := refusal(name, value):
        return [Wrong(f"--{name}", refused=why)]
    if known.arity or inline is None or _truth(name, inline):
        megatron[name] = Given(value, f"--{name}", 2)
    return []


def _values(rest: list[str]) -> list[str]:
    """Take the words up to the next flag."""
    taken = []
    while rest and (not rest[0].startswith("-") or _NEGATIVE.fullmatch(rest[0])):
        taken.append(rest.pop(0))
    return taken


def _known_flag(
    name: str,
    inline: str | None,
    rest: list[str],
    options: dict[str, Option],
    switches: dict[str, Option],
) -> str:
    if name in switches:
        return f"--{name}" if inline is None else _switch(name, inline, switches)
    one_value = name in options and not options[name].is_list
    if inline is None and one_value and rest and _NEGATIVE.fullmatch(rest[0]):
        inline = rest.pop(0)  # argparse would read -1e-5 as a flag
    return f"--{name}" if inline is None else f"--{name}={inline}"


def _switch(name: str, text: str, switches: dict[str, Option]) -> str:
    """Return `--x=yes` as `--x`, `--x=no` and `--no_x=yes` as `--x=false`, which flags.py reads as one word."""
    wanted = _truth(name, text) == (name == switches[name].name)
    return f"--{switches[name].name}" if wanted else f"--{switches[name].name}=false"


def _truth(name: str, text: str) -> bool:
    value = _TRUTH.get(text.lower())
    if value is None:
        raise ConfigError(f"--{name}={text}: {text!r} is not true or false")
    return value


def _collect(name: str, inline: str | None, rest: list[str], others: dict[str, Any]) -> None:
    from megatron_ft.config.yaml_file import yaml_value

    if inline is None and name.startswith("no_"):
        others[name.removeprefix("no_")] = None
    elif inline is None and (not rest or _FLAG.fullmatch(rest[0])):
        others[name] = True
    else:
        others[name] = yaml_value(rest.pop(0) if inline is None else inline)
