"""Writes metrics to TensorBoard, with the names in metrics.jsonl. An optional package."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from megatron_ft.errors import ConfigError
from megatron_ft.training.hooks import Hook, numbers
from megatron_ft.training.samples import Sample


class TensorBoard(Hook):
    """Scalars by iteration. Raise ConfigError where tensorboard is not installed."""

    def __init__(self, folder: str):
        try:
            from torch.utils.tensorboard import SummaryWriter
        except ImportError as error:
            raise ConfigError("--tensorboard_dir needs tensorboard: pip install 'megatron_ft[logging]'") from error
        self.writer = SummaryWriter(folder)

    def on_step(self, iteration: int, metrics: dict[str, Any]) -> None:
        for name, value in numbers(metrics):
            self.writer.add_scalar(name, value, iteration)

    on_eval = on_step

    def on_samples(self, iteration: int, samples: Sequence[Sample]) -> None:
        for number, sample in enumerate(samples, 1):
            self.writer.add_text(f"samples/{number}", sample.markdown(), iteration)

    def on_end(self) -> None:
        self.writer.close()
