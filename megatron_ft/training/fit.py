"""The checkpoint from which a run begins, and the rules between its model and the settings of the run. Without torch.

finetune, preflight and rehearse call `find_start`. Together with `checks.check_settings` it has every rule that can be checked before
processes start.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from pathlib import Path

from megatron_ft.checkpoints import select
from megatron_ft.checkpoints.folder import (
    CheckpointConfig,
    check_sizes,
    check_training_state,
    describe,
)
from megatron_ft.config.checks import (
    classic_saves_fit,
    data_parallel_size,
    microbatches_fit_chunks,
    recompute_groups_fit,
    rows_fit_positions,
)
from megatron_ft.config.sections import Checkpointing
from megatron_ft.config.settings import TrainingSettings
from megatron_ft.models.architecture import refuse_experts
from megatron_ft.models.pipeline import split_layers
from megatron_ft.models.trainable import check_patterns
from megatron_ft.training.adapting import find_adapting
from megatron_ft.training.model_flags import check_model_flags
from megatron_ft.training.teacher import find_teacher


@dataclasses.dataclass(frozen=True)
class Start:
    """The checkpoint and settings from which a run begins.

    folders: the checkpoints that may be loaded, newest first. index: of the first with all its files. described: its description.
    settings: as given, but --auto_resume resets --finetune if the run continues from --save. read: returns the description of another of
    the folders and checks the rules for it.
    """

    folders: list[Path]
    index: int
    described: CheckpointConfig
    settings: TrainingSettings
    read: Callable[[Path], CheckpointConfig]

    @property
    def folder(self) -> Path:
        return self.folders[self.index]


def find_start(settings: TrainingSettings, world_size: int) -> Start:
    """Find the checkpoint from which a run of so many processes begins. Raise UserError if there is none, or it does not fit."""
    folders, checkpointing = select.sources(settings.checkpointing)
    settings = dataclasses.replace(settings, checkpointing=checkpointing)

    def read(folder: Path) -> CheckpointConfig:
        return check_model(settings, describe(folder), folder, world_size)

    index, described = select.first_whole(folders, read, checkpointing)
    return Start(folders, index, described, settings, read)


def check_model(
    settings: TrainingSettings, described: CheckpointConfig, folder: Path, world_size: int
) -> CheckpointConfig:
    """Check every rule between settings and a model. Return its description, with RoPE scaling by flags.

    Raise ConfigError or CheckpointError, with both values and the remedy. folder: of the checkpoint, for the message.
    """
    refuse_experts(described.architecture)
    described = check_model_flags(settings.model, described)
    parallel, checkpointing = settings.parallel, settings.checkpointing
    split = split_layers(described.architecture.num_layers, parallel)
    check_sizes(folder, described, parallel.tensor_model_parallel_size, split.stages, split)
    classic_saves_fit(checkpointing, split.is_plain)
    dp_size = data_parallel_size(parallel, world_size)
    microbatches_fit_chunks(parallel, settings.batch, settings.data, dp_size, split.virtual_size)
    recompute_groups_fit(settings.numerics, [len(chunk) for stage in split.chunks for chunk in stage])
    rows_fit_positions(settings.data, described.architecture.max_position_embeddings)
    check_patterns(settings.optimizer.unfrozen_parameters, described.architecture)
    anew = starts_anew(described, checkpointing)
    find_adapting(settings, described, folder, anew)
    find_teacher(settings, described)
    if not anew:
        check_training_state(folder, described)
    return described


def starts_anew(described: CheckpointConfig, checkpointing: Checkpointing) -> bool:
    """Return whether only weights are loaded: the checkpoint was converted, or --finetune is set."""
    return described.iteration == "release" or checkpointing.finetune
