"""The length of a run: --epochs as a number of steps, once the rows of the data are known."""

from __future__ import annotations

import dataclasses
from typing import TYPE_CHECKING

from megatron_ft.config.checks import data_parallel_size
from megatron_ft.config.schedule import warmup_fits, wsd_fits
from megatron_ft.config.settings import TrainingSettings

if TYPE_CHECKING:
    from megatron_ft.data.loader import ChatDataset


def rows_per_step(settings: TrainingSettings, world_size: int) -> int:
    """Return the rows of a global batch."""
    batch = settings.batch
    return batch.global_batch_size or batch.micro_batch_size * data_parallel_size(settings.parallel, world_size)


def with_steps(settings: TrainingSettings, train_set: ChatDataset, world_size: int) -> TrainingSettings:
    """Return the settings with --epochs as --train_iters, which a checkpoint records. Raise ConfigError if they are too few.

    The same data, rows and batch give the same number, so a resumed run has that of its first start.
    """
    epochs = settings.batch.epochs
    if epochs is None:
        return settings
    steps = max(1, -(-train_set.rows_of(epochs) // rows_per_step(settings, world_size)))
    batch = dataclasses.replace(settings.batch, train_iters=steps, epochs=None)
    warmup_fits(settings.optimizer, batch)
    wsd_fits(settings.optimizer, batch)
    return dataclasses.replace(settings, batch=batch)
