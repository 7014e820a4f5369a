"""Metrics to TensorBoard and Weights & Biases, under the names that metrics.jsonl has. Both are optional installs."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

from megatron_ft.errors import ConfigError
from megatron_ft.training.hooks import Hook


class TensorBoard(Hook):
    """Scalars by iteration. Raises ConfigError where tensorboard is not installed."""

    def __init__(self, folder: str):
        try:
            from torch.utils.tensorboard import SummaryWriter
        except ImportError as error:
            raise ConfigError("--tensorboard_dir needs tensorboard: pip install 'megatron_ft[logging]'") from error
        self.writer = SummaryWriter(folder)

    def on_step(self, iteration, metrics):
        for name, value in _numbers(metrics):
            self.writer.add_scalar(name, value, iteration)

    on_eval = on_step

    def on_end(self):
        self.writer.close()


class WeightsAndBiases(Hook):
    """A wandb run with the resolved settings. Raises ConfigError where wandb is not installed."""

    def __init__(self, project: str, name: str | None, folder: Path | None, settings: dict[str, Any]):
        try:
            import wandb
        except ImportError as error:
            raise ConfigError("--wandb_logger needs wandb: pip install 'megatron_ft[logging]'") from error
        if folder:
            folder.mkdir(parents=True, exist_ok=True)
        self.run = wandb.init(project=project, name=name, dir=folder and str(folder), config=settings)

    def on_step(self, iteration, metrics):
        self.run.log(dict(_numbers(metrics)), step=iteration)

    on_eval = on_step

    def on_end(self):
        self.run.finish()


def _numbers(metrics: dict[str, Any]):
    return ((k, v) for k, v in metrics.items() if isinstance(v, int | float) and math.isfinite(v))
