"""The command line: finds a command in the table and imports only that one.

It uses only the names of the commands. So `megatron-ft --help` needs little time, and command modules may import anything.
"""

import sys
from collections.abc import Sequence

from megatron_ft import __version__
from megatron_ft.commands.table import ALIASES, COMMANDS, ENTRIES, Entry, find, load, spelled, starting_with
from megatron_ft.config.cli import run_script
from megatron_ft.config.hints import nearest


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command. argv: without the program's name. Returns the exit code: 0, 2 a user's mistake, 1 our bug."""
    argv = list(sys.argv[1:] if argv is None else argv)
    if not argv or argv[0] in ("-h", "--help", "help"):
        print(overview())
        return 0
    if argv[0] in ("-V", "--version"):
        print(f"megatron_ft {__version__}")
        return 0
    name, rest = find(argv)
    if name is not None:
        command, run = load(name)
        return run_script(command, run, rest)
    if (group := starting_with(argv[0])) and (len(argv) == 1 or argv[1] in ("-h", "--help", "help")):
        print(group_overview(spelled(argv[0]), group))
        return 0
    print(f"megatron-ft: error: {unknown(argv, group)}", file=sys.stderr)
    return 2


def unknown(words: Sequence[str], group: dict[str, Entry]) -> str:
    """Say that the words are no command. group: the commands that begin with the first word."""
    if group and words[1].startswith("-"):
        seconds = ", ".join(name.split()[1] for name in group)
        return f"{words[0]} needs a second word before its flags, one of: {seconds}"
    typed = words[: 2 if group else 1]
    known = list(group) or [*(name.split()[0] for name in ENTRIES), *ALIASES]
    where = f"megatron-ft {spelled(words[0])}" if group else "megatron-ft"
    hint = nearest(" ".join(map(spelled, typed)), known) or f"; {where} --help lists them"
    return f"unknown command {' '.join(typed)}{hint}"


def group_overview(word: str, group: dict[str, Entry]) -> str:
    """Return a list of the commands whose names begin with a word."""
    width = max(map(len, group)) + 2
    lines = [f"usage: megatron-ft {word} COMMAND [--flag value ...]", ""]
    lines += [f"  {name:{width}}{entry.summary}" for name, entry in group.items()]
    return "\n".join([*lines, "", f"Flags and examples of a command: megatron-ft {word} COMMAND --help"])


def overview() -> str:
    """Return a list of all commands with their summaries, grouped by task."""
    width = max(map(len, ENTRIES)) + 2
    lines = ["usage: megatron-ft COMMAND [--flag value ...]", ""]
    for group, entries in COMMANDS.items():
        lines += [group, *(f"  {name:{width}}{entry.summary}" for name, entry in entries.items())]
    aliases = ", ".join(f"{alias} is {name}" for alias, name in ALIASES.items())
    return "\n".join([*lines, "", f"{aliases}.", "Flags and examples of a command: megatron-ft COMMAND --help"])


if __name__ == "__main__":
    sys.exit(main())
