"""The command line: finds a command in the table and imports only that one.

It uses only the names of the commands. So `megatron-ft --help` needs little time, and command modules may import anything.
"""

import sys
from collections.abc import Sequence

from megatron_ft import __version__
from megatron_ft.commands.table import ALIASES, COMMANDS, ENTRIES, load
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
    name = argv[0].replace("_", "-")
    name = ALIASES.get(name, name)
    if name not in ENTRIES:
        hint = nearest(name, [*ENTRIES, *ALIASES]) or "; megatron-ft --help lists them"
        print(f"megatron-ft: error: unknown command {argv[0]}{hint}", file=sys.stderr)
        return 2
    command, run = load(name)
    return run_script(command, run, argv[1:])


def overview() -> str:
    """Return a list of all commands with their summaries, grouped by task."""
    width = max(map(len, ENTRIES)) + 2
    lines = ["usage: megatron-ft COMMAND [--flag value ...]", ""]
    for group, entries in COMMANDS.items():
        lines += [group, *(f"  {name:{width}}{entry.summary}" for name, entry in entries.items()), ""]
    aliases = ", ".join(f"{alias} is {name}" for alias, name in ALIASES.items())
    return "\n".join([*lines, f"{aliases}.", "Flags and examples of a command: megatron-ft COMMAND --help"])


if __name__ == "__main__":
    sys.exit(main())
