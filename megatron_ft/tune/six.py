"""The six commands of tune, as a user would type them."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from megatron_ft.data.chat_format import OWN_TEMPLATE
from megatron_ft.tune.choice import Choice
from megatron_ft.tune.layout import processes
from megatron_ft.tune.look import Machine

PROMPTS, MOST_HELD_OUT, NEW_TOKENS = 8, 500, 64


@dataclass(frozen=True)
class Places:
    """The files below the output folder."""

    folder: Path

    def __getitem__(self, name: str) -> str:
        return str(self.folder / name)

    @property
    def data(self) -> str:
        return self["data/chats"]

    @property
    def prompts(self) -> str:
        return f"{self.data}-val-prompts.jsonl"


@dataclass(frozen=True)
class Step:
    """One command. title: what it does, in a few words. result: the file that exists when it has finished."""

    title: str
    words: list[str]
    result: Path


def pretokenize(chats: Sequence[str], model: str, chat_format: str, places: Places, more: Sequence[str] = ()) -> Step:
    words = [
        "megatron-ft", "pretokenize", "--input", *chats, "--tokenizer", model, "--chat_format", chat_format,
        "--output_prefix", places.data, "--val_split", "0.1", "--max_val_set", str(MOST_HELD_OUT),
        "--write_prompts", str(PROMPTS), *more,
    ]  # fmt: skip
    return Step("chats to shards", words, Path(f"{places.data}-train-manifest.json"))


def convert(model: str, chat_format: str, places: Places) -> Step:
    named = [] if chat_format == OWN_TEMPLATE else ["--chat_format", chat_format]
    words = ["megatron-ft", "hf-to-megatron", model, places["base"], *named]
    return Step("model to checkpoint", words, Path(places["base"]) / "latest_checkpointed_iteration.txt")


def ask(when: str, checkpoint: str, places: Places, machine: Machine) -> Step:
    """Return the command that asks held-out questions. when: before or after."""
    words = [
        "megatron-ft", "generate", "--load", places[checkpoint], "--prompts", places.prompts,
        "--output", places[f"{when}.jsonl"], "--max_new_tokens", str(NEW_TOKENS), *(["--bf16"] if machine.gpus else []),
    ]  # fmt: skip
    return Step(f"ask {when} training", words, Path(places[f"{when}.jsonl"]))


def finetune(choice: Choice, given: dict[str, Any], places: Places, machine: Machine) -> Step:
    per_node = processes(choice, machine)
    nodes = machine.gpus // per_node if machine.gpus else 1
    chosen: dict[str, Any] = {"nproc_per_node": per_node} | ({"nnodes": nodes} if nodes > 1 else {})
    chosen |= {"load": places["base"], "save": places["tuned"], "data_path": f"{places.data}-train"}
    chosen |= choice.flags | {name: value for name, value in given.items() if name not in choice.flags}
    chosen |= {"sample_prompts": places.prompts, "sample_interval": choice.steps, "run_dir": str(places.folder)}
    words = ["megatron-ft", "finetune", *as_words(chosen), "--auto_resume"]
    return Step("train", words, Path(places["tuned"]) / f"iter_{choice.steps:07d}")


def export(lora: bool, places: Places) -> Step:
    words = ["megatron-ft", "merge-adapter" if lora else "megatron-to-hf", places["tuned"], places["hf"]]
    return Step("checkpoint to a Hugging Face model", words, Path(places["hf"]) / "config.json")


def as_words(flags: dict[str, Any]) -> list[str]:
    """Return flags as words. True: a switch; None: its --no_ form."""
    words: list[str] = []
    for name, value in flags.items():
        if value is None or value is False:
            words.append(f"--no_{name}")
        elif value is True:
            words.append(f"--{name}")
        else:
            words += [f"--{name}", *map(str, value if isinstance(value, list) else [value])]
    return words
