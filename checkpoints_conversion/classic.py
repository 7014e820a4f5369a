"""Megatron's classic format: one model_optim_rng.pt for every tensor- and pipeline-parallel rank.

It is written and read without processes: a rank is only an index. Both directions handle one tensor at a time. Only plain types and
tensors are written and accepted.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from checkpoints_conversion.stream import Unit
from checkpoints_conversion.torch_zip import Slot, TorchZip
from megatron_ft.checkpoints.folder import CheckpointConfig, rank_file
from megatron_ft.errors import CheckpointError
from megatron_ft.models.torch_file import TensorRef, TorchFile
from megatron_ft.models.weights import Placed, Rule, pad_rows, placed_rules
from megatron_ft.wording import counted

VERSION = 3.0


def plan_classic(
    folder: Path, config: CheckpointConfig, rules: Sequence[Rule], dtype: Callable[[Placed], torch.dtype]
) -> list[Unit]:
    """Return one unit per pipeline stage: the files of its tensor-parallel ranks. Each tensor is read once and split for all of them."""
    return [_plan_stage(folder, config, rules, dtype, stage) for stage in range(config.pipeline_model_parallel_size)]


def _plan_stage(folder: Path, config: CheckpointConfig, rules: Sequence[Rule], dtype: Callable, stage: int) -> Unit:
    arch, tp_size, pp_size = (
        config.architecture,
        config.tensor_model_parallel_size,
        config.pipeline_model_parallel_size,
    )
    placed = list(placed_rules(arch, rules, pp_size, stage))
    slots = {one.local_key: Slot(dtype(one), part_shape(one, config)) for one in placed}
    iteration = config.iteration if isinstance(config.iteration, int) else 0
    state = {"checkpoint_version": VERSION, "iteration": iteration, "model": slots}
    archives = [TorchZip(state) for _ in range(tp_size)]
    paths = [rank_file(folder, rank, stage, tp_size, pp_size) for rank in range(tp_size)]

    def task(number: int, one: Placed) -> tuple[Placed, Callable[[list[int], Tensor], None]]:
        def put(handles: list[int], full: Tensor) -> None:
            for rank in range(tp_size):
                archives[rank].write(handles[rank], number, _own_part(one, full, config, rank))

        return one, put

    def finish(handles: list[int]) -> None:
        for archive, handle in zip(archives, handles, strict=True):
            archive.finish(handle)

    return Unit(
        {path: archive.size for path, archive in zip(paths, archives, strict=True)},
        [task(number, one) for number, one in enumerate(placed)],
        finish,
        [(key, slot.shape, slot.nbytes) for key, slot in slots.items()],
    )


def part_shape(placed: Placed, config: CheckpointConfig) -> tuple[int, ...]:
    """Return the shape of one rank's part."""
    return placed.rule.part_shape(config.architecture, config.tensor_model_parallel_size, config.padded_vocab_size)


def _own_part(placed: Placed, full: Tensor, config: CheckpointConfig, tp_rank: int) -> Tensor:
    if placed.rule.cut != "vocab_parallel":
        return placed.rule.part(full, config.tensor_model_parallel_size, tp_rank)
    rows = part_shape(placed, config)[0]
    return pad_rows(full[tp_rank * rows : (tp_rank + 1) * rows], rows)


class ClassicSource:
    """Opened rank files. Raises CheckpointError with the file's name if one is missing, truncated or does not match."""

    def __init__(self, folder: Path, config: CheckpointConfig, rules: Sequence[Rule]) -> None:
        self.config = config
        self._models: dict[str, list[dict[str, TensorRef]]] = {}
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
        """Return the whole tensor without padding rows."""
        local_key = self._local_keys[placed.key]
        parts = [model[local_key].read() for model in self._models[placed.key]]
        return placed.rule.join(self.config.architecture, parts)

    def dtype(self, placed: Placed) -> torch.dtype:
        return self._models[placed.key][0][self._local_keys[placed.key]].dtype


def _read_model(path: Path) -> dict[str, Any]:
    state = TorchFile(path).value
    model = state.get("model") if isinstance(state, dict) else None
    if not isinstance(model, dict):
        raise CheckpointError(f"{path} has no entry 'model'; it was not written by megatron_ft")
    return {key: value for key, value in model.items() if isinstance(value, TensorRef)}


def _check(path: Path, model: dict[str, Any], placed: Sequence[Placed], config: CheckpointConfig) -> None:
    found = {key for key in model if not key.endswith("_extra_state")}
    wanted = {one.local_key: one for one in placed}
    if missing := sorted(set(wanted) - found):
        raise CheckpointError(
            f"{path} lacks {counted(len(missing), 'tensor')}, first {missing[0]}: config.json has another layout"
        )
    family = config.architecture.family
    if left_over := sorted(found - set(wanted)):
        raise CheckpointError(f"{path} holds {left_over[0]} ({len(left_over)} such), unknown to {family} models")
    for key, one in wanted.items():
        shape = part_shape(one, config)
        if tuple(model[key].shape) != shape:
            raise CheckpointError(f"{path}: {key} is {list(model[key].shape)}, config.json has {list(shape)}")
