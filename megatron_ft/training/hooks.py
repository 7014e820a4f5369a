"""What watches a run: progress lines for people, metrics.jsonl for tools. The loop calls them; they never touch the model."""

from __future__ import annotations

import json
import math
import sys
import time
from pathlib import Path
from typing import Any, TextIO

METRICS = "metrics.jsonl"


class Hook:
    """Every method is optional. `metrics` maps the names documented in docs/metrics.md to numbers."""

    def on_start(self, metrics: dict[str, Any]) -> None: ...
    def on_step(self, iteration: int, metrics: dict[str, Any]) -> None: ...
    def on_eval(self, iteration: int, metrics: dict[str, Any]) -> None: ...
    def on_save(self, iteration: int, folder: Path) -> None: ...
    def on_end(self) -> None: ...


class MetricsFile(Hook):
    """One JSON object a line, flushed at once; resumed runs append."""

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
        self.file.write(json.dumps({"iteration": iteration, **finite}) + "\n")
        self.file.flush()


class Console(Hook):
    """Megatron's progress line, which people grep, every `log_interval` steps; then tokens/s and the time left."""

    def __init__(self, train_iters: int, log_interval: int, out: TextIO | None = None):
        self.train_iters, self.log_interval, self.out = train_iters, log_interval, out or sys.stdout
        self.window: list[dict[str, Any]] = []
        self.skipped = 0
        self.nan = 0

    def on_step(self, iteration, metrics):
        self.window.append(metrics)
        self.skipped += metrics["train/skipped"]
        self.nan += not math.isfinite(metrics["train/loss"])
        if iteration % self.log_interval == 0 or iteration == self.train_iters:
            self._print(self._line(iteration))
            self.window = []

    def on_eval(self, iteration, metrics):
        loss = metrics["eval/loss"]
        self._print(
            f" validation loss at iteration {iteration} | lm loss value: {loss:.6E} | lm loss PPL: {math.exp(min(loss, 20)):.6E} |"
        )

    def on_save(self, iteration, folder):
        self._print(f" saved checkpoint {folder}")

    def _line(self, iteration: int) -> str:
        last, count = self.window[-1], len(self.window)
        seconds = sum(m["train/seconds"] for m in self.window)
        rates = (sum(m[name] for m in self.window) / seconds for name in ("train/tokens", "train/supervised_tokens"))
        left = time.strftime("%H:%M:%S", time.gmtime((self.train_iters - iteration) * seconds / count))
        width = len(str(self.train_iters))
        return (
            f" iteration {iteration:{width}d}/ {self.train_iters} | consumed samples: {last['train/consumed_samples']:8d} | "
            f"elapsed time per iteration (ms): {1000 * seconds / count:.1f} | learning rate: {last['train/lr']:.3E} | "
            f"global batch size: {last['train/global_batch_size']:5d} | lm loss: {sum(m['train/loss'] for m in self.window) / count:.6E} | "
            f"grad norm: {last['train/grad_norm']:.3f} | number of skipped iterations: {self.skipped} | "
            f"number of nan iterations: {self.nan} | "
            "tokens/s: {:.0f} | trained tokens/s: {:.0f} | ".format(*rates)
            + f"eta: {left} |"
        )

    def _print(self, line: str) -> None:
        print(line, file=self.out, flush=True)
