"""The table of commands: name -> where it lives and what it does. Names only; a command's module is imported when asked for."""

import importlib
from collections.abc import Callable
from typing import NamedTuple

from megatron_ft.config.command import Command


class Entry(NamedTuple):
    """Where a command lives and what it does, in one line."""

    module: str
    summary: str


COMMANDS: dict[str, dict[str, Entry]] = {
    "Try it": {
        "demo": Entry("megatron_ft.commands.demo", "all of it with a tiny model on this machine, in minutes"),
        "doctor": Entry("megatron_ft.commands.doctor", "what is installed, what will be used; --check tries it"),
    },
    "Prepare": {
        "pretokenize": Entry("tools.pretokenizer.pretokenize", "chat files to shards of tokens and their roles"),
        "merge": Entry("tools.pretokenizer.merge", "several shards into one, after checking them"),
        "inspect": Entry("megatron_ft.commands.inspect", "samples of shards as training sees them"),
        "hf-to-megatron": Entry(
            "checkpoints_conversion.hf_to_megatron", "a Hugging Face model to a checkpoint split over ranks"
        ),
        "reshard": Entry("checkpoints_conversion.reshard", "a checkpoint to another layout or format"),
        "verify": Entry("checkpoints_conversion.verify", "prove that a checkpoint is the model it came from"),
    },
    "Train": {
        "plan": Entry("megatron_ft.commands.plan", "will it fit: memory per stage, idle time, better layouts"),
        "preflight": Entry("megatron_ft.commands.preflight", "check shards against a finetune command line"),
        "finetune": Entry("megatron_ft.commands.finetune", "train a checkpoint on shards, over GPUs or CPU processes"),
        "resume-check": Entry("megatron_ft.commands.resume_check", "prove that stopping and resuming changes nothing"),
        "verify-invariance": Entry(
            "megatron_ft.commands.verify_invariance", "prove that every layout computes the same gradients"
        ),
        "report": Entry("megatron_ft.commands.report", "the page of a run: curves, where the loss is, layout"),
    },
    "Use": {
        "generate": Entry("megatron_ft.commands.generate", "answer prompts with a checkpoint"),
        "chat": Entry("megatron_ft.commands.chat", "talk with a checkpoint in the terminal"),
        "megatron-to-hf": Entry(
            "checkpoints_conversion.megatron_to_hf", "a checkpoint to a Hugging Face model, chat template too"
        ),
    },
    "Help": {
        "flags": Entry("megatron_ft.commands.flags", "every flag of every command, as Markdown"),
        "completion": Entry("megatron_ft.commands.completion", "completes commands and flags in bash or zsh"),
    },
}
ALIASES = {"train": "finetune", "env": "doctor"}
ENTRIES = {name: entry for group in COMMANDS.values() for name, entry in group.items()}


def load(name: str) -> tuple[Command, Callable[..., int | None]]:
    """What a command says of itself, and its run()."""
    module = importlib.import_module(ENTRIES[name].module)
    return module.COMMAND, module.run
