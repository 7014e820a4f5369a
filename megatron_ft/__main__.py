"""The front desk: a table of commands, and a loader that imports only the one asked for.

Knows the commands by name alone, so that `megatron-ft --help` answers at once and the command modules may depend on
what they like.
"""

import importlib
import sys
from collections.abc import Sequence
from typing import NamedTuple

from megatron_ft import __version__
from megatron_ft.config.cli import run_script
from megatron_ft.config.hints import nearest


class Entry(NamedTuple):
    """Where a command lives and what it does, in one line."""

    module: str
    summary: str


COMMANDS: dict[str, dict[str, Entry]] = {
    "Try it": {
        "demo": Entry("megatron_ft.commands.demo", "all of it with a tiny model on this machine, in minutes"),
        "doctor": Entry("megatron_ft.commands.doctor", "what is installed, what will be used, what is missing for what"),
    },
    "Prepare": {
        "pretokenize": Entry("tools.pretokenizer.pretokenize", "chat files to shards of tokens and their roles"),
        "merge": Entry("tools.pretokenizer.merge", "several shards into one, after checking them"),
        "inspect": Entry("megatron_ft.commands.inspect", "samples of shards as training sees them"),
        "hf-to-megatron": Entry(
            "checkpoints_conversion.hf_to_megatron", "a Hugging Face model to a checkpoint split over ranks"
        ),
        "reshard": Entry("checkpoints_conversion.reshard", "a checkpoint to another layout or format"),
        "verify": Entry(
            "checkpoints_conversion.verify", "prove that a checkpoint is the Hugging Face model it came from"
        ),
    },
    "Train": {
        "preflight": Entry("megatron_ft.commands.preflight", "check shards against a finetune command line"),
        "finetune": Entry("megatron_ft.commands.finetune", "train a checkpoint on shards, over GPUs or CPU processes"),
        "report": Entry("megatron_ft.commands.report", "the page of a run: curves, where the loss is, layout"),
    },
    "Use": {
        "generate": Entry("megatron_ft.commands.generate", "answer prompts with a checkpoint"),
        "chat": Entry("megatron_ft.commands.chat", "talk with a checkpoint in the terminal"),
        "megatron-to-hf": Entry(
            "checkpoints_conversion.megatron_to_hf", "a checkpoint to a Hugging Face model, chat template included"
        ),
    },
}
ALIASES = {"train": "finetune"}
_ENTRIES = {name: entry for group in COMMANDS.values() for name, entry in group.items()}


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
    if name not in _ENTRIES:
        hint = nearest(name, [*_ENTRIES, *ALIASES]) or "; megatron-ft --help lists them"
        print(f"megatron-ft: error: unknown command {argv[0]}{hint}", file=sys.stderr)
        return 2
    module = importlib.import_module(_ENTRIES[name].module)
    return run_script(module.COMMAND, module.run, argv[1:])


def overview() -> str:
    """Every command with its line, grouped by task."""
    width = max(map(len, _ENTRIES)) + 2
    lines = ["usage: megatron-ft COMMAND [--flag value ...]", ""]
    for group, entries in COMMANDS.items():
        lines += [group, *(f"  {name:{width}}{entry.summary}" for name, entry in entries.items()), ""]
    aliases = ", ".join(f"{alias} is {name}" for alias, name in ALIASES.items())
    return "\n".join([*lines, f"{aliases}. Flags and an example of each: megatron-ft COMMAND --help"])


if __name__ == "__main__":
    sys.exit(main())
