"""The command line: flags and their help from Options. The only file that knows argparse.

What argparse lacks is done on the arguments before it sees them: `-` for `_`, one suggestion for a flag nobody knows, `--switch=false`,
negative numbers such as -1e-5 as values, and flags collected for commands that take any.
"""

import argparse
import re
import typing
from dataclasses import dataclass, field
from typing import Any, NoReturn

from megatron_ft.config.command import Command
from megatron_ft.config.fields import MISSING, RESERVED, Option, default_of, section_title
from megatron_ft.config.hints import suggestion
from megatron_ft.errors import ConfigError

_FLAG = re.compile(r"--?([A-Za-z][\w.-]*)(?:=(.*))?", re.DOTALL)
_NEGATIVE = re.compile(r"-\.?\d.*")
_TRUTH = {"true": True, "yes": True, "on": True, "1": True, "false": False, "no": False, "off": False, "0": False}
_METAVAR = {int: "N", float: "X", str: "TEXT"}


@dataclass
class Given:
    """What stood on the command line, as text (True or False for a switch), and the flags that no section knows."""

    values: dict[str, Any]
    config: str | None = None
    print_config: bool = False
    others: dict[str, Any] = field(default_factory=dict)


def read_flags(command: Command, options: dict[str, Option], argv: list[str]) -> Given:
    """Split a command line into settings. Prints the help and raises SystemExit(0) for --help; ConfigError for what does not fit."""
    parser = _parser(command, options)
    given = Given({})
    cleaned = _clean(argv, options, parser, given.others if command.open_flags else None)
    parse = parser.parse_intermixed_args if command.positional else parser.parse_args
    values = vars(parse(cleaned))
    for name in command.positional:
        bare = values.pop("positional " + name, None)
        if bare not in (None, []):
            if name in values:
                raise ConfigError(f"{name} is given twice: {bare!r} and --{name} {values[name]!r}; keep one")
            values[name] = bare
    if "config" not in options:
        given.config = values.pop("config", None)
    given.print_config = values.pop("print_config", False)
    given.values = values
    return given


class _Parser(argparse.ArgumentParser):
    def error(self, message: str) -> NoReturn:
        raise ConfigError(message.replace("argument --", "--").replace("unrecognized arguments", "nothing takes") + "; see --help")


class _Switch(argparse.Action):
    """`--x` is True and `--no_x` is False, except for a field that is itself called no_something."""

    def __call__(self, parser: Any, namespace: Any, values: Any, option_string: str | None = None) -> None:
        setattr(namespace, self.dest, option_string == f"--{self.dest}")


def _parser(command: Command, options: dict[str, Option]) -> _Parser:
    positional = "".join(f" [{name}]" for name in command.positional)
    parser = _Parser(
        prog=f"megatron-ft {command.name}",
        usage=f"megatron-ft {command.name}{positional} [--flag value ...]",
        description=command.summary,
        epilog="\n  ".join(["examples:", *command.examples]) if command.examples else None,
        formatter_class=lambda prog: argparse.RawDescriptionHelpFormatter(prog, max_help_position=34),
        allow_abbrev=False,
        argument_default=argparse.SUPPRESS,
    )
    for name in command.positional:
        many = options[name].is_list
        parser.add_argument("positional " + name, nargs="*" if many else "?", metavar=name, help=f"the same as --{name}")
    if "config" not in options:
        parser.add_argument("--config", metavar="FILE.yaml", help="read settings from a file; flags win over it")
    parser.add_argument("--print_config", action="store_true", help="print the resulting settings as YAML and stop")
    for section in command.sections:
        group = parser.add_argument_group(section_title(section))
        for option in options.values():
            if option.section is section:
                _add(group, option, options)
    return parser


def _add(group: Any, option: Option, options: dict[str, Option]) -> None:
    flags, text = [f"--{option.name}"], _help(option)
    if option.is_switch:
        if not option.name.startswith("no_") and f"no_{option.name}" not in options:
            flags.append(f"--no_{option.name}")
        group.add_argument(*flags, dest=option.name, action=_Switch, nargs=0, help=text)
    else:
        group.add_argument(*flags, dest=option.name, nargs="+" if option.is_list else None, metavar=_metavar(option), help=text)


def _help(option: Option) -> str:
    default = default_of(option)
    if option.required:
        remark = "(required)"
    elif default in (None, MISSING, "", [], ()) or (option.is_switch and default is False):
        remark = ""
    elif isinstance(default, list | tuple):
        remark = f"(default: {' '.join(map(str, default))})"
    else:
        remark = f"(default: {str(default).lower() if isinstance(default, bool) else default})"
    return f"{option.help} {remark}".strip().replace("%", "%%")


def _metavar(option: Option) -> str:
    kind = option.bare_type
    if option.is_list:
        kind = (typing.get_args(kind) or (str,))[0]
    if typing.get_origin(kind) is typing.Literal:
        return "{" + ",".join(map(str, typing.get_args(kind))) + "}"
    return _METAVAR.get(kind) or ("PATH" if getattr(kind, "__name__", "") == "Path" else "VALUE")


def _clean(argv: list[str], options: dict[str, Option], parser: _Parser, others: dict[str, Any] | None) -> list[str]:
    """argv as argparse wants it. others: takes the flags nobody knows; None refuses them."""
    known = {flag.removeprefix("--") for flag in parser._option_string_actions if flag.startswith("--")}
    cleaned: list[str] = []
    rest = list(argv)
    while rest:
        token = rest.pop(0)
        match = _FLAG.fullmatch(token)
        if token == "--":
            return [*cleaned, token, *rest]
        if not match or token == "-h":
            cleaned.append(token)
            continue
        name, inline = match[1].replace("-", "_"), match[2]
        if name not in known or not token.startswith("--"):
            if others is None or not token.startswith("--"):
                near = [flag for flag in known if flag not in RESERVED or flag == "config"]
                raise ConfigError(f"unknown flag {token.split('=')[0]}{suggestion(name, near, '--')}")
            _collect(name, inline, rest, others)
        elif inline is not None and _switch_of(name, options):
            cleaned.append(_switch(token, name, inline, options))
        elif inline is None and rest and _NEGATIVE.fullmatch(rest[0]) and name in options and not options[name].is_switch:
            cleaned.append(f"--{name}={rest.pop(0)}")
        else:
            cleaned.append(f"--{name}" if inline is None else f"--{name}={inline}")
    return cleaned


def _collect(name: str, inline: str | None, rest: list[str], others: dict[str, Any]) -> None:
    from megatron_ft.config.yaml_file import yaml_value

    takes_next = inline is None and rest and not _FLAG.fullmatch(rest[0])
    if inline is None and not takes_next:
        others[name.removeprefix("no_")] = None if name.startswith("no_") else True
    elif name.startswith("no_") and inline is None:
        others[name.removeprefix("no_")] = None  # what follows is no value of it
    else:
        others[name] = yaml_value(rest.pop(0) if inline is None else inline)


def _switch_of(name: str, options: dict[str, Option]) -> Option | None:
    option = options.get(name) or options.get(name.removeprefix("no_"))
    return option if option and option.is_switch else None


def _switch(token: str, name: str, inline: str, options: dict[str, Option]) -> str:
    """`--x=false` as the flag that says the same: --no_x."""
    value, option = _TRUTH.get(inline.lower()), _switch_of(name, options)
    if value is None or option is None:
        raise ConfigError(f"{token}: {inline!r} is not true or false")
    if value:
        return f"--{name}"
    opposite = option.name if name != option.name else f"no_{name}"
    return f"--{opposite}"
