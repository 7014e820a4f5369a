"""The description of a command: its name, its sections, examples. Plain data; cli.py parses."""

import shlex
import sys
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path


@dataclass(frozen=True)
class Command:
    """One command of the command line.

    name: as typed after `megatron-ft`.
    summary: one line, shown at the top of the command's help.
    sections: dataclasses whose fields become flags and YAML keys, or groups: dataclasses whose fields are such sections. No flag may
        occur twice.
    examples: command lines for the end of the help.
    positional: names of fields that may also be given without their flag, in this order.
    open_flags: take flags that no section knows, `--key value` as {"key": value typed as YAML would} and `--no_key`
        as {"key": None}.
    megatron_flags: take the flags of Megatron's training commands too (megatron_flags.py).
    common: the flags that --help shows where all do not fit on one screen (help.py): a name, or "name: text" with a shorter text
        than the flag's own; (): all.
    short: a letter -> the flag that it stands for, as -o for --output_dir.
    """

    name: str
    summary: str
    sections: tuple[type, ...]
    examples: tuple[str, ...] = ()
    positional: tuple[str, ...] = ()
    open_flags: bool = False
    megatron_flags: bool = False
    common: tuple[str, ...] = ()
    short: Mapping[str, str] = field(default_factory=dict)


def command_line() -> str:
    """Return this process's own command line, quoted for a shell."""
    first = Path(sys.argv[0]).name
    words = ["megatron-ft"] if first == "__main__.py" else [first]
    return shlex.join([*words, *sys.argv[1:]])
