"""megatron-ft flags: every flag of a command, or of all, as Markdown. docs/flags.md is its output."""

from __future__ import annotations

import sys
from dataclasses import dataclass, field
from itertools import groupby
from typing import Any

from megatron_ft.commands.table import COMMANDS, ENTRIES, load
from megatron_ft.config.cli import Command, run_script
from megatron_ft.config.fields import MISSING, Option, default_of, options_of, section_name, section_title
from megatron_ft.errors import ConfigError


@dataclass
class Flags:
    """Which"""

    command: list[str] = field(default_factory=list)
    """names of commands; default: all"""


COMMAND = Command(
    name="flags",
    summary="every flag of every command, as Markdown",
    sections=(Flags,),
    examples=("megatron-ft flags finetune", "megatron-ft flags > docs/flags.md"),
    positional=("command",),
)


def run(options: Flags) -> int:
    """Raises ConfigError for a command that there is not."""
    for name in options.command:
        if name not in ENTRIES:
            raise ConfigError(f"no command {name}; megatron-ft --help lists them")
    print(reference(options.command))
    return 0


def reference(names: list[str]) -> str:
    """Markdown: a chapter a group, a heading a command, a table a section."""
    parts = [_HEAD] if not names else []
    for group, entries in COMMANDS.items():
        wanted = [name for name in entries if not names or name in names]
        parts += [f"## {group}\n"] if wanted and not names else []
        parts += [_command(name) for name in wanted]
    return "\n".join(parts).rstrip()


_HEAD = """# Every flag

Made by `make docs` from the commands themselves. `-` and `_` are the same in a flag; a switch `--x` has its opposite `--no_x`. Every flag
is also a key of the YAML file given with `--config`, alone or below its section's name; flags win over the file, the file over the
defaults; `--print_config` shows the result.
"""


def _command(name: str) -> str:
    command, _ = load(name)
    lines = [f"### megatron-ft {name}\n", f"{command.summary[:1].upper()}{command.summary[1:]}.\n"]
    for section, members in groupby(options_of(command.sections).values(), key=lambda option: option.section):
        title = section_title(section)
        lines += [f"**{title}** (`{section_name(section)}`)\n", "| flag | default | |", "|---|---|---|"]
        lines += [_row(option) for option in members] + [""]
    if command.open_flags:
        lines.append("Any other flag is a setting of the configuration file.\n")
    if command.examples:
        lines += ["```", *command.examples, "```", ""]
    return "\n".join(lines)


def _row(option: Option) -> str:
    value = default_of(option)
    shown = "" if value is MISSING or value in (None, [], "") else f"`{_plain(value)}`"
    choices = () if option.is_list else getattr(option.bare_type, "__args__", ())
    cells = (
        f"`--{option.name}`" + (f" {' | '.join(map(str, choices))}" if choices else ""),
        "**needed**" if option.required else shown,
        option.help,
    )
    return f"| {' | '.join(cell.replace('|', _BAR) for cell in cells)} |"


_BAR = "\\|"  # inside a cell


def _plain(value: Any) -> str:
    if isinstance(value, bool):
        return "on" if value else "off"
    return " ".join(map(str, value)) if isinstance(value, list | tuple) else str(value)


if __name__ == "__main__":
    sys.exit(run_script(COMMAND, run))
