"""The command line: flags and their help made from Options. The only module that uses argparse."""

import argparse
import re
import textwrap
import typing
from dataclasses import dataclass, field
from typing import Any, NoReturn

from megatron_ft.config import megatron_flags
from megatron_ft.config.argv import OWN_FLAGS, ready, switch_flags
from megatron_ft.config.command import Command
from megatron_ft.config.fields import MISSING, Option, default_of, flat, section_title
from megatron_ft.config.help import SCREEN, WIDTH, screen, usage
from megatron_ft.errors import ConfigError

_OVERRIDE = re.compile(r"(?<!\S)(?:\w+\.)+(\w+)=(\S+)")
"""A setting as Megatron-Bridge and Hydra write it: train.train_iters=50."""
_METAVAR = {int: "N", float: "X", str: "TEXT"}


@dataclass
class Given:
    """The flags on the command line, as text (True or False for a switch), and the flags that are in no section."""

    values: dict[str, Any]
    config: str | None = None
    print_config: bool = False
    others: dict[str, Any] = field(default_factory=dict)
    megatron: dict[str, megatron_flags.Given] = field(default_factory=dict)
    """Flags of Megatron that are not ours."""


def read_flags(command: Command, options: dict[str, Option], argv: list[str]) -> Given:
    """Split a command line into settings; --help prints and raises SystemExit(0).

    Raise ConfigError for an unknown flag, one without its value, and an unexpected value.
    """
    parser = _parser(command, options)
    given = Given({})
    short = {f"-{letter}": f"--{name}" for letter, name in command.short.items()}
    others = given.others if command.open_flags else None
    megatron = given.megatron if command.megatron_flags else None
    cleaned = ready([short.get(word, word) for word in argv], options, others, megatron)
    parse = parser.parse_intermixed_args if command.positional else parser.parse_args
    values = vars(parse(cleaned))
    for name in command.positional:
        bare = values.pop("positional " + name, None)
        if bare in (None, []):
            continue
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
        message = message.replace("argument --", "--").replace("unrecognized arguments", "nothing takes")
        overrides = _OVERRIDE.findall(message) if "nothing takes" in message else []
        hint = f" (as flags: {' '.join(f'--{key} {value}' for key, value in overrides)})" if overrides else ""
        raise ConfigError(f"{message}{hint}; see --help")


class _Switch(argparse.Action):
    """The field's own name is True; its other spellings, `--no_x` and `--x=false`, are False."""

    def __call__(self, parser: Any, namespace: Any, values: Any, option_string: str | None = None) -> None:
        setattr(namespace, self.dest, option_string == f"--{self.dest}")


def _help_action(command: Command, options: dict[str, Option]) -> type[argparse.Action]:
    """Return what --help does: print one screen, and with the word `all` everything."""

    class Help(argparse.Action):
        def __call__(self, parser: Any, namespace: Any, values: Any, option_string: str | None = None) -> None:
            whole = parser.format_help()
            short = values != "all" and len(whole.splitlines()) > SCREEN
            print(screen(command, options) if short else whole.rstrip())
            raise SystemExit(0)

    return Help


def _parser(command: Command, options: dict[str, Option]) -> _Parser:
    parser = _Parser(
        prog=f"megatron-ft {command.name}",
        usage=usage(command).removeprefix("usage: "),
        description=textwrap.fill(command.summary, WIDTH),
        epilog="\n  ".join(["examples:", *command.examples]) if command.examples else None,
        formatter_class=lambda prog: argparse.RawDescriptionHelpFormatter(prog, max_help_position=34),
        allow_abbrev=False,
        add_help=False,
        argument_default=argparse.SUPPRESS,
    )
    shows = _help_action(command, options)
    parser.add_argument("-h", "--help", nargs="?", metavar="all", action=shows, help="show one screen of help, or all")
    for name in command.positional:
        many = options[name].is_list
        same = f"the same as --{name}"
        parser.add_argument("positional " + name, nargs="*" if many else "?", metavar=name, help=same)
    if "config" not in options:
        parser.add_argument("--config", metavar="FILE.yaml", help="read settings from a file; flags win over it")
    parser.add_argument("--print_config", action="store_true", help="print the resulting settings as YAML and stop")
    for section in flat(command.sections):
        group = parser.add_argument_group(section_title(section))
        for option in options.values():
            if option.section is section:
                _add(group, option, options)
    return parser


def _add(group: Any, option: Option, options: dict[str, Option]) -> None:
    text = _help(option)
    if option.is_switch:
        flags = [f"--{flag}" for flag in switch_flags(option, options)]
        group.add_argument(*flags, dest=option.name, action=_Switch, nargs=0, help=text)
        hidden = argparse.SUPPRESS
        group.add_argument(f"--{option.name}=false", dest=option.name, action=_Switch, nargs=0, help=hidden)
    else:
        many = "+" if option.is_list else None
        group.add_argument(f"--{option.name}", dest=option.name, nargs=many, metavar=_metavar(option), help=text)


def _help(option: Option) -> str:
    default = default_of(option)
    if option.required:
        remark = f"(required, or --{option.instead})" if option.instead else "(required)"
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


def spellings(options: dict[str, Option]) -> list[str]:
    """Return every flag of a command, including `--no_x` and the general ones."""
    named = (switch_flags(option, options) if option.is_switch else [option.name] for option in options.values())
    return [f"--{flag}" for flags in (*named, OWN_FLAGS) for flag in flags]
