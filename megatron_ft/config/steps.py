"""The rule of the number of steps, which two flags give."""

from __future__ import annotations

import math

from megatron_ft.config.sections import Batch
from megatron_ft.errors import ConfigError


def one_length(batch: Batch) -> None:
    """Check that the length of the run is given once."""
    if batch.epochs is None:
        if batch.train_iters < 1:
            raise ConfigError(f"--train_iters {batch.train_iters}: must be at least 1")
    elif batch.train_iters:
        raise ConfigError(
            f"--epochs {batch.epochs:g} and --train_iters {batch.train_iters} both give the length of the run: keep one"
        )
    elif not 0 < batch.epochs < math.inf:
        raise ConfigError(f"--epochs {batch.epochs:g}: must be above 0")
