"""The table of commands: name -> module and summary. A command's module is imported only when the command is used.

A name may have two words, such as "evaluate perplexity".
"""

import importlib
from collections.abc import Callable, Collection, Sequence
from typing import NamedTuple

from megatron_ft.collector import no_collection
from megatron_ft.config.command import Command


class Entry(NamedTuple):
    """A command's module and its summary of one line."""

    module: str
    summary: str


COMMANDS: dict[str, dict[str, Entry]] = {
    "Try it": {
        "demo": Entry("megatron_ft.commands.demo", "run every step with a tiny model, in minutes"),
        "tune": Entry("megatron_ft.commands.tune", "tune a model on your chats, in one command"),
        "doctor": Entry("megatron_ft.commands.doctor", "list what is installed and used; --check runs small tests"),
    },
    "Prepare": {
        "import-command": Entry("megatron_ft.commands.import_command", "print our commands for another tool's file"),
        "pretokenize": Entry("tools.pretokenizer.pretokenize", "convert chat files to shards of tokens and roles"),
        "merge": Entry("tools.pretokenizer.merge", "join several shards into one, after checking them"),
        "inspect": Entry("megatron_ft.commands.inspect", "show samples of shards as training sees them"),
        "hf-to-megatron": Entry(
            "checkpoints_conversion.hf_to_megatron", "convert a Hugging Face model to a split checkpoint"
        ),
        "reshard": Entry("checkpoints_conversion.reshard", "convert a checkpoint to another layout or format"),
        "verify": Entry("checkpoints_conversion.verify", "check that a checkpoint equals its Hugging Face model"),
    },
    "Train": {
        "plan": Entry("megatron_ft.commands.plan", "estimate memory and idle time, propose layouts"),
        "preflight": Entry("megatron_ft.commands.preflight", "check shards and checkpoint for a finetune command"),
        "score": Entry("megatron_ft.commands.score", "store a teacher's likely tokens, for distillation"),
        "finetune": Entry("megatron_ft.commands.finetune", "train a checkpoint on shards, over GPUs or CPU processes"),
        "resume-check": Entry(
            "megatron_ft.commands.resume_check", "check that stopping and resuming does not change a run"
        ),
        "verify-invariance": Entry(
            "megatron_ft.commands.verify_invariance", "check that every layout computes the same gradients"
        ),
        "report": Entry("megatron_ft.commands.report", "write the HTML page of a run: curves, data, layout"),
        "compare": Entry("megatron_ft.commands.compare", "compare the losses of several runs in one HTML page"),
    },
    "Use": {
        "generate": Entry("megatron_ft.commands.generate", "answer prompts with a checkpoint or an exported model"),
        "sample": Entry("megatron_ft.commands.sample", "sampling report: prompts x settings, models side by side"),
        "chat": Entry("megatron_ft.commands.chat", "chat with a checkpoint or an exported model"),
        "train-predictors": Entry(
            "megatron_ft.commands.train_predictors", "train predictors of zero activations for sparse decoding"
        ),
        "measure": Entry("megatron_ft.commands.measure", "measure memory and time of a model in 16, 8 and 4 bits"),
        "megatron-to-hf": Entry(
            "checkpoints_conversion.megatron_to_hf", "convert a checkpoint to a Hugging Face model"
        ),
        "merge-adapter": Entry(
            "checkpoints_conversion.merge_adapter",
            "write a model with its adapters for Hugging Face",
        ),
        "serve": Entry("checkpoints_conversion.serve", "print which servers load an export, with their commands"),
    },
    "Evaluate": {
        "evaluate perplexity": Entry(
            "megatron_ft.commands.evaluate_perplexity", "perplexity of models by length of the context"
        ),
        "evaluate sparsity": Entry(
            "megatron_ft.commands.evaluate_sparsity", "share of zeros in the MLPs of models, by layer"
        ),
        "evaluate retrieval": Entry(
            "megatron_ft.commands.evaluate_retrieval", "measure retrieval from long prompts, compare models"
        ),
        "evaluate harness": Entry("megatron_ft.commands.evaluate_harness", "score a model on lm-eval's tasks"),
    },
    "Help": {
        "flags": Entry("megatron_ft.commands.flags", "print all flags of all commands, as Markdown"),
        "completion": Entry("megatron_ft.commands.completion", "print a completion script for bash or zsh"),
    },
}
ALIASES = {"train": "finetune", "env": "doctor"}
ENTRIES = {name: entry for group in COMMANDS.values() for name, entry in group.items()}


def spelled(word: str) -> str:
    """Return a word of a command's name with - for _ and an alias in full."""
    word = word.replace("_", "-")
    return ALIASES.get(word, word)


def find(words: Sequence[str], names: Collection[str] = ENTRIES) -> tuple[str | None, list[str]]:
    """Return the longest name that the words begin with, or None, and the words after it."""
    for count in (2, 1):
        name = " ".join(map(spelled, words[:count]))
        if name in names:
            return name, list(words[count:])
    return None, list(words)


def starting_with(word: str) -> dict[str, Entry]:
    """Return the commands whose names have this first word and a second one."""
    return {name: entry for name, entry in ENTRIES.items() if name.startswith(f"{spelled(word)} ")}


def load(name: str) -> tuple[Command, Callable[..., int | None]]:
    """Return a command's description and its run()."""
    with no_collection():
        module = importlib.import_module(ENTRIES[name].module)
    return module.COMMAND, module.run
