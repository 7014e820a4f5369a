"""Megatron's classic format: one model_optim_rng.pt for every tensor- and pipeline-parallel rank.

Written and read without processes: a rank is a number here. Written one rank's file at a time; read through a memory
map, one tensor at a time. Only plain types and tensors are stored, and only those are accepted.
"""

from __future__ import annotations

import pickle
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from megatron_ft.errors import CheckpointError
from megatron_ft.models.checkpoint_layout import CheckpointConfig, rank_file
from megatron_ft.models.weights import Placed, Rule, pad_rows, placed_rules

VERSION = 3.0


def write_classic(
    folder: Path, config: CheckpointConfig, rules: Sequence[Rule], full: Callable[[Placed], Tensor]
) -> int:
    """Write every rank's file under `folder`. Returns the number of files. Memory: one file, and one whole tensor."""
    tp_size, pp_size = config.tensor_model_parallel_size, config.pipeline_model_parallel_size
    for pp_rank in range(pp_size):
        for tp_rank in range(tp_size):
            path = rank_file(folder, tp_rank, pp_rank, tp_size, pp_size)
            path.parent.mkdir(parents=True, exist_ok=True)
            # The dict has no name here: one that outlived the call would double the memory.
            torch.save(_rank_state(config, rules, full, tp_rank, pp_rank), path)
    return tp_size * pp_size


def _rank_state(
    config: CheckpointConfig, rules: Sequence[Rule], full: Callable[[Placed], Tensor], tp_rank: int, pp_rank: int
) -> dict[str, Any]:
    placed = placed_rules(config.architecture, rules, config.pipeline_model_parallel_size, pp_rank)
    model = {one.local_key: _own_part(one, full(one), config, tp_rank) for one in placed}
    return {"checkpoint_version": VERSION, "iteration": 0, "model": model}


def _own_part(placed: Placed, full: Tensor, config: CheckpointConfig, tp_rank: int) -> Tensor:
    """A copy: torch.save of a view would store the whole tensor behind it."""
    if placed.rule.cut == "vocab_rows":
        full = pad_rows(full, config.padded_vocab_size)
    return placed.rule.part(full, config.tensor_model_parallel_size, tp_rank).clone()


class ClassicSource:
    """Opened rank files. Raises CheckpointError, naming the file, for a missing, truncated or ill-fitting one."""

    def __init__(self, folder: Path, config: CheckpointConfig, rules: Sequence[Rule]) -> None:
        self.config = config
        self._models: dict[str, list[dict[str, Tensor]]] = {}
        self._local_keys: dict[str, str] = {}
        tp_size, pp_size = config.tensor_model_parallel_size, config.pipeline_model_parallel_size
        for pp_rank in range(pp_size):
            paths = [rank_file(folder, tp_rank, pp_rank, tp_size, pp_size) for tp_rank in range(tp_size)]
            models = [_read_model(path) for path in paths]
            placed = list(placed_rules(config.architecture, rules, pp_size, pp_rank))
            for path, model in zip(paths, models, strict=True):
                _check(path, model, placed, config)
            for one in placed:
                if not one.is_copy:
                    self._models[one.key], self._local_keys[one.key] = models, one.local_key

    def full(self, placed: Placed) -> Tensor:
        """The whole tensor, padding rows dropped."""
        local_key = self._local_keys[placed.key]
        return placed.rule.join(self.config.architecture, [model[local_key] for model in self._models[placed.key]])


def _read_model(path: Path) -> dict[str, Any]:
    if not path.is_file():
        raise CheckpointError(f"{path} is missing; restore it, or read an earlier iteration with --iteration")
    try:
        state = torch.load(path, map_location="cpu", weights_only=True, mmap=True)
    except pickle.UnpicklingError as error:
        raise CheckpointError(f"{path} is damaged, or holds objects other than tensors and plain values") from error
    except (RuntimeError, OSError, EOFError, ValueError, KeyError) as error:
        raise CheckpointError(f"{path} is cut short or damaged; restore it, or read an earlier iteration") from error
    model = state.get("model") if isinstance(state, dict) else None
    if not isinstance(model, dict):
        raise CheckpointError(f"{path} has no entry 'model'; it was not written by megatron_ft")
    return model


def _check(path: Path, model: dict[str, Any], placed: Sequence[Placed], config: CheckpointConfig) -> None:
    found = {key for key in model if not key.endswith("_extra_state")}
    wanted = {one.local_key: one for one in placed}
    if missing := sorted(set(wanted) - found):
        raise CheckpointError(
            f"{path} lacks {len(missing)} tensors, first {missing[0]}: config.json says another layout"
        )
    family = config.architecture.family
    if left_over := sorted(found - set(wanted)):
        raise CheckpointError(f"{path} holds {left_over[0]} ({len(left_over)} such), unknown to {family} models")
    for key, one in wanted.items():
        shape = one.rule.part_shape(config.architecture, config.tensor_model_parallel_size, config.padded_vocab_size)
        if tuple(model[key].shape) != shape:
            raise CheckpointError(f"{path}: {key} is {list(model[key].shape)}, config.json says {list(shape)}")
