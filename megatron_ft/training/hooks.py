"""Observers of a run. The loop calls hooks; they never change the model. This module has
metrics.jsonl and samples.jsonl, for tools."""

from __future__ import annotations

import contextlib
import json
import math
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from megatron_ft.training.samples import SAMPLES, Sample, line

METRICS = "metrics.jsonl"


class Hook:
    """Every method is optional, and may raise: see guard.py. `metrics` maps the names documented in docs/metrics.md to numbers."""

    def on_step(self, iteration: int, metrics: dict[str, Any]) -> None: ...
    def on_eval(self, iteration: int, metrics: dict[str, Any]) -> None: ...
    def on_samples(self, iteration: int, samples: Sequence[Sample]) -> None: ...
    def on_save(self, iteration: int, folder: Path) -> None: ...
    def on_end(self) -> None: ...
    def abandon(self) -> None:
        """Release what the hook holds in this process, without waiting. It has failed and is not called again."""


def numbers(metrics: dict[str, Any]) -> Iterator[tuple[str, float]]:
    """Yield the entries that are finite numbers."""
    return ((k, v) for k, v in metrics.items() if isinstance(v, int | float) and math.isfinite(v))


class MetricsFile(Hook):
    """One JSON object per line, flushed at once; resumed runs append."""

    def __init__(self, folder: Path):
        folder.mkdir(parents=True, exist_ok=True)
        self.file = open(folder / METRICS, "a", encoding="utf-8")  # noqa: SIM115 - open for the whole run

    def on_step(self, iteration: int, metrics: dict[str, Any]) -> None:
        self._write(iteration, metrics)

    def on_eval(self, iteration: int, metrics: dict[str, Any]) -> None:
        self._write(iteration, metrics)

    def on_save(self, iteration: int, folder: Path) -> None:
        self._write(iteration, {"checkpoint": str(folder)})

    def on_end(self) -> None:
        self.file.close()

    def abandon(self) -> None:
        with contextlib.suppress(OSError):  # the rest cannot be flushed either
            self.file.close()

    def _write(self, iteration: int, metrics: dict[str, Any]) -> None:
        finite = {k: (v if not isinstance(v, float) or math.isfinite(v) else None) for k, v in metrics.items()}
        self.file.write(json.dumps({"iteration": iteration, **finite}) + "\n")
        self.file.flush()


class SamplesFile(Hook):
    """One JSON object per answer. The file begins with the first answers; resumed runs append."""

    def __init__(self, folder: Path):
        self.path = folder / SAMPLES

    def on_samples(self, iteration: int, samples: Sequence[Sample]) -> None:
        self.path.parent.mkdir(parents=True, exist_ok=True)
        with self.path.open("a", encoding="utf-8") as file:
            file.writelines(line(iteration, sample) for sample in samples)
