"""The length of a run and of its warm-up as numbers of steps, once the rows of the data are known."""

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
    """Return the settings with --epochs and --lr_warmup_fraction as steps, which a checkpoint records. Raise ConfigError for too few.

    The same data, rows and batch give the same number, so a resumed run has that of its first start.
    """
    batch, optimizer = settings.batch, settings.optimizer
    if batch.epochs is not None:
        steps = max(1, -(-train_set.rows_of(batch.epochs) // rows_per_step(settings, world_size)))
        batch = dataclasses.replace(batch, train_iters=steps, epochs=None)
    if (share := optimizer.lr_warmup_fraction) is not None:
        first = round(share * (optimizer.lr_decay_iters or batch.train_iters))
        optimizer = dataclasses.replace(optimizer, lr_warmup_iters=first, lr_warmup_fraction=None)
    warmup_fits(optimizer, batch)
    wsd_fits(optimizer, batch)
    return dataclasses.replace(settings, batch=batch, optimizer=optimizer)
