"""The resident teacher of a run: the checkpoint that holds it, and the rules between it, the model and the layout. Without torch."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

from megatron_ft.checkpoints.folder import CheckpointConfig, check_sizes, describe, find_checkpoint, vocab_rows
from megatron_ft.config.checks import rows_fit_positions
from megatron_ft.config.settings import TrainingSettings
from megatron_ft.data.loader import ChatDataset
from megatron_ft.errors import ConfigError, UserError
from megatron_ft.models.architecture import padded_vocab_size, refuse_experts
from megatron_ft.models.pipeline import PipelineSplit, split_beside, split_layers


@dataclasses.dataclass(frozen=True)
class Teacher:
    """folder: of the checkpoint. described: its description. split: its layers on each stage."""

    folder: Path
    described: CheckpointConfig
    split: PipelineSplit


def find_teacher(settings: TrainingSettings, student: CheckpointConfig) -> Teacher | None:
    """Return the teacher of a run that trains `student`; None without --teacher. Raise UserError if it does not fit."""
    if settings.distillation.teacher is None:
        return None
    try:
        return _found(settings, student, Path(settings.distillation.teacher))
    except UserError as error:
        raise type(error)(f"--teacher: {error}") from error


def _found(settings: TrainingSettings, student: CheckpointConfig, root: Path) -> Teacher:
    folder = find_checkpoint(root)
    described = describe(folder)
    arch = described.architecture
    if described.adapter is not None:
        raise ConfigError(
            f"{folder} holds adapters, not a model: merge them with megatron-ft megatron-to-hf, and convert the result"
        )
    refuse_experts(arch)
    same_vocabulary(folder, described, student)
    rows_fit_positions(settings.data, arch.max_position_embeddings)
    ours = split_layers(student.architecture.num_layers, settings.parallel)
    split = split_beside(ours, student.architecture.num_layers, arch.num_layers)
    check_sizes(folder, described, settings.parallel.tensor_model_parallel_size, split.stages, split)
    same_rows(folder, described, student, settings.parallel.tensor_model_parallel_size)
    return Teacher(folder, described, split)


def same_vocabulary(folder: Path, teacher: CheckpointConfig, student: CheckpointConfig) -> None:
    """Raise ConfigError unless every id means the same token to both models."""
    theirs, ours = teacher.architecture.vocab_size, student.architecture.vocab_size
    if theirs != ours:
        raise ConfigError(
            f"{folder} has a vocabulary of {theirs}, the model one of {ours}: the teacher must have the same; convert both with the same "
            f"tokenizer and extra tokens"
        )
    one, other = (config.tokenizer.get("fingerprint") for config in (teacher, student))
    if one and other and one != other:
        raise ConfigError(
            f"{folder} has another tokenizer ({one[:13]}) than the model ({other[:13]}): an id must mean the same token to both; convert "
            f"both with the same tokenizer and extra tokens"
        )


def same_rows(folder: Path, teacher: CheckpointConfig, student: CheckpointConfig, tp_size: int) -> None:
    """Raise ConfigError unless both models cut the vocabulary at the same places. Classic checkpoints define their rows."""
    theirs, ours = (
        vocab_rows(one) or padded_vocab_size(one.architecture.vocab_size, tp_size) for one in (teacher, student)
    )
    if theirs != ours:
        raise ConfigError(
            f"{folder} has {theirs} rows in its embedding, the model {ours}, so that ranks would hold different tokens: make both "
            f"torch_dist checkpoints with megatron-ft reshard"
        )


def stored_teachers(train_set: ChatDataset) -> dict[str, Any] | None:
    """Return what run.json says of the teachers whose log-probabilities the training set has; None: it has none."""
    if train_set.scored is None:
        return None
    return {"stored": [one.record() for one in train_set.scored]}
