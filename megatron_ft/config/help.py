"""The help of one screen: a line for each flag, of commands with many flags for those used most. `--help all` has every flag in full."""

import re
import textwrap
from itertools import groupby

from megatron_ft.config.command import Command
from megatron_ft.config.fields import MISSING, Option, default_of, section_title

SCREEN = 44  # lines
WIDTH = 80
_NAMES = 35  # columns of the flags' names, at most
_WORD = re.compile(r"""(?:[^\s"']|"[^"]*"|'[^']*')+""")
_PART, _LEAST = re.compile(r" \(|[:,] "), 24  # where a help text may end, and after how many letters
_METAVAR = {int: "N", float: "X", str: "TEXT"}
_GENERAL = {
    "--config FILE.yaml": "read settings from a file; flags win",
    "--print_config": "print all settings as YAML and stop",
}


def screen(command: Command, options: dict[str, Option]) -> str:
    """Return usage, flags, an example and how to see the rest, in lines of at most WIDTH columns."""
    briefs = {name: text.strip() for name, _, text in (one.partition(":") for one in command.common)}
    shown = [option for option in options.values() if not briefs or option.name in briefs]
    names = {option.name: _name(option) for option in shown}
    general = {} if "config" in options else _GENERAL
    indent = min(_NAMES, max(map(len, [*names.values(), *general]))) + 4
    lines = [usage(command), *textwrap.wrap(command.summary, WIDTH), ""]
    for section, members in groupby(shown, key=lambda option: option.section):
        lines.append(section_title(section).split("; ")[0])
        for one in members:
            lines += _line(names[one.name], _text(one, WIDTH - indent, briefs.get(one.name)), indent)
    if general:
        lines += ["Settings", *(line for name, text in general.items() for line in _line(name, [text], indent))]
    lines += ["", *_example(min(command.examples, key=len, default=""))]
    rest = f"all {len(options)} flags" if len(shown) < len(options) else "more about them"
    return "\n".join([*lines, f"{rest}: megatron-ft {command.name} --help all"])


def usage(command: Command) -> str:
    """Return the line of usage."""
    positional = "".join(f" [{name}]" for name in command.positional)
    return f"usage: megatron-ft {command.name}{positional} [--flag value ...]"


def brief(text: str, width: int) -> list[str]:
    """Return the beginning of a help text on one or two lines: up to a semicolon or the end of a sentence, if need be up to the last
    bracket, colon or comma that fits.
    """
    first = text.split("; ")[0].split(". ")[0].rstrip(".")
    ends = [len(first), *(found.start() for found in _PART.finditer(first) if found.start() >= _LEAST)]
    for end in sorted(ends, reverse=True):
        part = first[:end]
        if len(lines := textwrap.wrap(part, width)) <= 2 and part.count("(") == part.count(")"):
            return lines
    return textwrap.wrap(first, width, max_lines=2, placeholder=" ...")


def _name(option: Option) -> str:
    """Return a flag with what follows it."""
    if option.is_switch:
        return f"--[no_]{option.name}" if default_of(option) is True else f"--{option.name}"
    choices = [str(one) for one in getattr(option.bare_type, "__args__", ())] if not option.is_list else []
    listed = f"--{option.name} {{{','.join(choices)}}}"
    if choices and len(listed) <= _NAMES:
        return listed
    return f"--{option.name} {_METAVAR.get(option.bare_type, 'TEXT')}{' ...' if option.is_list else ''}"


def _text(option: Option, width: int, short: str | None) -> list[str]:
    """Return what a flag does, with its default. short: the text for it; None or "": the first part of its help."""
    lines, remark = brief(short or option.help, width), _default(option)
    for part in (remark, *(part for part in option.help.split("; ") if part.startswith("default: ") and not remark)):
        joined = textwrap.wrap(" ".join(lines) + (f"; {part}" if part != remark else part), width)
        lines = joined if len(joined) <= max(len(lines), 1 + bool(remark)) else lines
    return lines


def _default(option: Option) -> str:
    value = default_of(option)
    if option.required:
        return f" (required, or --{option.instead})" if option.instead else " (required)"
    if value in (None, MISSING, "", [], ()) or isinstance(value, bool):
        return ""
    return f" [{' '.join(map(str, value)) if isinstance(value, list | tuple) else value}]"


def _line(name: str, text: list[str], indent: int) -> list[str]:
    """Return a flag and its text, beside it or, if the name is too long, below it."""
    lines = [" " * indent + line for line in text]
    return [f"  {name}", *lines] if len(name) + 4 > indent else [f"  {name}".ljust(indent) + text[0], *lines[1:]]


def _example(text: str) -> list[str]:
    """Return a command line, continued with backslashes where it is too long."""
    lines = ["  "]
    for word in _WORD.findall(text):
        if len(lines[-1]) + len(word) > WIDTH - 4:
            lines.append("    ")
        lines[-1] += word + " "
    return ["example:", *(f"{line.rstrip()} \\" for line in lines[:-1]), lines[-1].rstrip()] if text else []
