"""What watches a run. The loop calls hooks; they never touch the model. Here: metrics.jsonl, for tools."""

from __future__ import annotations

import contextlib
import json
import math
from pathlib import Path
from typing import Any

from megatron_ft.log import logger

log = logger("training")

METRICS = "metrics.jsonl"


class Hook:
    """Every method is optional. `metrics` maps the names documented in docs/metrics.md to numbers."""

    def on_step(self, iteration: int, metrics: dict[str, Any]) -> None: ...
    def on_eval(self, iteration: int, metrics: dict[str, Any]) -> None: ...
    def on_save(self, iteration: int, folder: Path) -> None: ...
    def on_end(self) -> None: ...


class MetricsFile(Hook):
    """One JSON object a line, flushed at once; resumed runs append. A disk that refuses is said once and does not end the run."""

    def __init__(self, folder: Path):
        folder.mkdir(parents=True, exist_ok=True)
        self.file = open(folder / METRICS, "a", encoding="utf-8")  # noqa: SIM115 - open for the whole run

    def on_step(self, iteration, metrics):
        self._write(iteration, metrics)

    def on_eval(self, iteration, metrics):
        self._write(iteration, metrics)

    def on_save(self, iteration, folder):
        self._write(iteration, {"checkpoint": str(folder)})

    def on_end(self):
        self.file.close()

    def _write(self, iteration: int, metrics: dict[str, Any]) -> None:
        finite = {k: (v if not isinstance(v, float) or math.isfinite(v) else None) for k, v in metrics.items()}
        if self.file.closed:
            return
        try:
            self.file.write(json.dumps({"iteration": iteration, **finite}) + "\n")
            self.file.flush()
        except OSError as error:
            log.error(f"{self.file.name}: {(error.strerror or str(error)).lower()}; no more metrics are written there")
            with contextlib.suppress(OSError):  # what is still to be flushed is refused again
                self.file.close()
