"""Writes a Megatron checkpoint in either format from any reader of whole tensors, or plans its files."""

from __future__ import annotations

import shutil
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from checkpoints_conversion.classic import plan_classic
from checkpoints_conversion.stream import Unit, resumable_folder, seal, write_units
from checkpoints_conversion.tokenizer_copy import copy_tokenizer
from checkpoints_conversion.torch_dist import finish_torch_dist, plan_torch_dist
from megatron_ft.checkpoints.folder import (
    TOKENIZER_FOLDER,
    TRAINED_ON,
    CheckpointConfig,
    iteration_folder,
    write_config,
    write_tracker,
)
from megatron_ft.models.architecture import refuse_experts
from megatron_ft.models.weights import Placed, Rule, placed_rules

if TYPE_CHECKING:
    from megatron_ft.data.tokenizer import Tokenizer


def write_checkpoint(
    target: Path,
    config: CheckpointConfig,
    rules: Sequence[Rule],
    full: Callable[[Placed], Tensor],
    dtype: Callable[[Placed], torch.dtype],
    tokenizer: Tokenizer | None,
    key: dict,
    overwrite: bool = False,
    source: Path | None = None,
) -> int:
    """Write a root folder with one checkpoint and its tracker; it appears only when it is complete. Return the number of weight files.

    full, dtype: return a whole tensor, and its type in advance. key: see resumable_folder. source: a checkpoint whose record of its
    training data is copied.
    """
    config = replace(config, digested=True)
    with resumable_folder(target, {**key, "format": config.ckpt_format}, overwrite) as root:
        folder = iteration_folder(root, config.iteration)
        folder.mkdir(exist_ok=True)
        units, finish = plan(folder, config, rules, dtype)
        files = write_units(units, full, f"writing {target.name}:")
        finish()
        if tokenizer is not None:
            _replace_tokenizer(tokenizer, folder)
        if source is not None and (source / TRAINED_ON).is_file():
            shutil.copyfile(source / TRAINED_ON, folder / TRAINED_ON)
        write_config(folder, config)
        seal(folder, files)
        write_tracker(root, config.iteration)
    return len(files)


def plan(
    folder: Path, config: CheckpointConfig, rules: Sequence[Rule], dtype: Callable[[Placed], torch.dtype]
) -> tuple[list[Unit], Callable[[], None]]:
    """Return (the files, the function to call when they are written)."""
    refuse_experts(config.architecture)
    if config.ckpt_format == "torch":
        return plan_classic(folder, config, rules, dtype), lambda: None
    placed = placed_rules(config.architecture, rules)
    units, metadata = plan_torch_dist(folder, placed, config.architecture, dtype)
    iteration = config.iteration if isinstance(config.iteration, int) else 0
    return units, lambda: finish_torch_dist(folder, metadata, iteration)


def _replace_tokenizer(tokenizer: Tokenizer, folder: Path) -> None:
    import shutil

    shutil.rmtree(folder / TOKENIZER_FOLDER, ignore_errors=True)  # possibly an incomplete copy of an interrupted run
    copy_tokenizer(tokenizer, folder)
