"""A model with adapters, built to be used: by generate, chat and verify. Training has its own code (commands/finetune_rank.py)."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

from megatron_ft.adapters.base import check_base, freeze, weight_hashes
from megatron_ft.adapters.find import find_base
from megatron_ft.adapters.lora import attach, fill_adapters
from megatron_ft.adapters.stored import Stored, of_checkpoint
from megatron_ft.checkpoints.folder import CheckpointConfig, describe, vocab_rows
from megatron_ft.checkpoints.load import load_weights
from megatron_ft.checkpoints.quantised import nf4_of
from megatron_ft.checkpoints.verify import verify
from megatron_ft.engine.parallel import Layout
from megatron_ft.models.architecture import Architecture
from megatron_ft.models.build import BuildOptions, build_model


def build_adapted(
    folder: Path, described: CheckpointConfig, layout: Layout, options: BuildOptions, base: str | None = None, digests: bool = True
) -> Any:  # fmt: skip
    """Return the model of a checkpoint of adapters, with its base and the adapters loaded. All ranks call it.

    base: the checkpoint of the model; default: the recorded one. digests: compare the base's files with their digests.
    """
    source = find_base(described, folder, base)
    config = describe(source)
    verify(source, config, layout, digests)
    model = build_model(
        described.architecture, layout, replace(options, padded_vocab_size=vocab_rows(config), nf4=nf4_of(config))
    )
    load_weights(source, config, model, layout, verified=True)
    stored = of_checkpoint(folder, described)
    add_adapters(model, described.architecture, stored, layout, source)
    if config.quantization is None and stored.nf4:
        freeze([model], config.dtype)
    return model


def add_adapters(model: Any, arch: Architecture, stored: Stored, layout: Layout, where: Path) -> None:
    """Add adapters to a loaded model. Raise CheckpointError unless its weights, which are in `where`, are those of their training."""
    if stored.recorded is not None:
        check_base(stored.recorded, weight_hashes([model], arch), where)
    attach([model], arch, stored.lora)
    fill_adapters([model], stored.read, layout.tp_size, layout.tp_rank)
