"""Flags of the commands that evaluate several models on the same texts, with a name for each model."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from megatron_ft.commands.in_layout import Asked, GenerationLayout, in_layout
from megatron_ft.config.sections import Processes
from megatron_ft.errors import ConfigError
from megatron_ft.wording import counted

if TYPE_CHECKING:
    from megatron_ft.engine.parallel import Layout


@dataclass
class ComparedModels:
    """Models and texts"""

    load: list[str] = field(default_factory=list)
    """folders of checkpoints or of exported Hugging Face models; several are compared"""
    names: list[str] = field(default_factory=list)
    """names of the models in --load, in their order, separated by spaces; default: the names of their folders"""
    adapter: list[str] = field(default_factory=list)
    """adapters of the models in --load, in their order (none: a model without): checkpoints of runs with --lora_rank, or PEFT folders"""
    data: list[str] = field(default_factory=list)
    """prefixes of shards, whose samples are documents, or text files, each of them one document"""
    bf16: bool = False
    """compute in bfloat16 instead of fp32"""
    verify_checkpoint: bool = True
    """compare the folders' files with their recorded digests, if there are any; --no_verify_checkpoint skips this"""


def check_models(options: ComparedModels) -> None:
    """Raise ConfigError for missing models or texts, and for names or adapters that do not fit."""
    if not options.load:
        raise ConfigError("--load is needed: the folder of a checkpoint or of an exported model, or several")
    if not options.data:
        raise ConfigError("--data is needed: prefixes of shards or text files")
    names_of(options), adapters_of(options)


def compare_models(
    options: ComparedModels, measure: Callable[[str, str | None, Layout], dict[str, Any]], write: Callable[[list[dict[str, Any]]], None],
    rows: int, length: int, parallel: GenerationLayout, processes: Processes,
) -> int:  # fmt: skip
    """Call measure(model, adapter, layout) for every model in all processes, and write(results) in one. Return the exit code.

    rows, length: of the largest batch.
    """
    from megatron_ft.checkpoints.folder import check_folder

    names, adapters = names_of(options), adapters_of(options)
    for given in (*options.load, *filter(None, adapters)):
        check_folder(Path(given))

    def work(layout: Layout) -> None:
        results = [
            {"name": name, "load": load, "adapter": adapter, **measure(load, adapter, layout)}
            for name, load, adapter in zip(names, options.load, adapters, strict=True)
        ]
        if layout.is_main:
            write(results)

    asked = [
        Asked(load, adapter, options.bf16, rows, length) for load, adapter in zip(options.load, adapters, strict=True)
    ]
    return in_layout(work, asked, parallel, processes)


def names_of(options: ComparedModels) -> list[str]:
    """Return a name for each model, all different."""
    names = options.names or [Path(load).resolve().name for load in options.load]
    if len(names) != len(options.load):
        raise ConfigError(
            f"--names has {counted(len(names), 'name')} for {counted(len(options.load), 'model')} in --load: give one for each"
        )
    if twice := [name for name, count in Counter(names).items() if count > 1]:
        raise ConfigError(f"two models have the name {twice[0]}: give different ones with --names")
    return names


def adapters_of(options: ComparedModels) -> list[str | None]:
    """Return the adapter of each model, or None."""
    given = options.adapter or ["none"] * len(options.load)
    if len(given) != len(options.load):
        raise ConfigError(
            f"--adapter has {counted(len(given), 'entry')} for {counted(len(options.load), 'model')} in --load: give one for each, none "
            f"for a model without"
        )
    return [None if adapter == "none" else adapter for adapter in given]
