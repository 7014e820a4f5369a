"""Progress for people: Megatron's line in a log, where it can be searched; a live line on a terminal."""

from __future__ import annotations

import contextlib
import math
import os
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any, TextIO

from megatron_ft.training.hooks import Hook
from megatron_ft.training.samples import Sample, summary


class Console(Hook):
    """A line every `log_interval` steps in Megatron's order; then tokens/s and the time left."""

    def __init__(self, train_iters: int, log_interval: int, out: TextIO | None = None):
        self.train_iters, self.log_interval, self.out = train_iters, log_interval, out or sys.stdout
        self.window: list[dict[str, Any]] = []
        self.skipped = 0
        self.nan = 0

    def on_step(self, iteration: int, metrics: dict[str, Any]) -> None:
        self.window.append(metrics)
        self.skipped += metrics["train/skipped"]
        self.nan += not math.isfinite(metrics["train/loss"])
        if iteration % self.log_interval == 0 or iteration == self.train_iters:
            self.print(self._line(iteration))
            self.window = []

    def on_eval(self, iteration: int, metrics: dict[str, Any]) -> None:
        self.print(
            f" validation loss at iteration {iteration} | lm loss value: {metrics['eval/loss']:.6E} | "
            f"lm loss PPL: {metrics['eval/perplexity']:.6E} |"
        )

    def on_samples(self, iteration: int, samples: Sequence[Sample]) -> None:
        self.print(f" answers at iteration {iteration} | {summary(samples)} |")

    def on_save(self, iteration: int, folder: Path) -> None:
        self.print(f" saved checkpoint {folder}")

    def abandon(self) -> None:
        with contextlib.suppress(OSError, ValueError):  # Python must not write the rest again when it ends
            os.dup2(os.open(os.devnull, os.O_WRONLY), self.out.fileno())

    def _line(self, iteration: int) -> str:
        last, count = self.window[-1], len(self.window)
        seconds, rates = self._rates()
        left = duration((self.train_iters - iteration) * seconds / count)
        width = len(str(self.train_iters))
        speed = ""
        if "train/tflops" in last:
            mfu = f" ({last['train/mfu']:.1%} MFU)" if "train/mfu" in last else ""
            speed = f"throughput per GPU (TFLOP/s/GPU): {last['train/tflops']:.1f}{mfu} | "
        scale = f"loss scale: {last['train/loss_scale']:.1f} | " if "train/loss_scale" in last else ""
        zeros = f"MLP zeros: {self._mean_sparsity():.2%} | " if "train/sparsity" in last else ""
        return (
            f" iteration {iteration:{width}d}/ {self.train_iters} | "
            f"consumed samples: {last['train/consumed_samples']:8d} | "
            f"elapsed time per iteration (ms): {1000 * seconds / count:.1f} | learning rate: {last['train/lr']:.3E} | "
            f"global batch size: {last['train/global_batch_size']:5d} | "
            f"lm loss: {self._mean_loss()} | {self._parts()}"
            f"{scale}grad norm: {last['train/grad_norm']:.3f} | number of skipped iterations: {self.skipped} | "
            f"number of nan iterations: {self.nan} | tokens/s: {rates[0]:.0f} | trained tokens/s: {rates[1]:.0f} | "
            f"{zeros}{speed}eta: {left} |"
        )

    def _parts(self) -> str:
        """The means of the parts of a distilled loss; empty for others."""
        steps = [m for m in self.window if not m.get("train/empty")]
        return "".join(
            f"{name} loss: {sum(m[f'train/{name}'] for m in steps) / len(steps):.6E} | "
            for name in ("ce", "kl")
            if steps and all(f"train/{name}" in m for m in steps)
        )

    def _mean_loss(self) -> str:
        """The mean over the steps of the window that had a supervised token."""
        losses = [m["train/loss"] for m in self.window if not m.get("train/empty")]
        return f"{sum(losses) / len(losses):.6E}" if losses else "none (no supervised token)"

    def _mean_sparsity(self) -> float:
        return sum(m["train/sparsity"] for m in self.window) / len(self.window)

    def _rates(self) -> tuple[float, list[float]]:
        """Return (seconds, [tokens/s, trained tokens/s]) over the window."""
        seconds = sum(m["train/seconds"] for m in self.window)
        return seconds, [sum(m[f"train/{n}"] for m in self.window) / seconds for n in ("tokens", "supervised_tokens")]

    def print(self, line: str) -> None:
        print(line, file=self.out, flush=True)


class LiveConsole(Console):
    """One line that is redrawn: bar, loss, grad norm, rates, time left. Evaluations and saves scroll by above it."""

    def __init__(self, train_iters: int, log_interval: int, out: TextIO | None = None):
        from rich.console import Console as Screen
        from rich.progress import BarColumn, Progress, TextColumn, TimeRemainingColumn

        super().__init__(train_iters, log_interval, out)
        columns = (
            TextColumn("{task.completed}/{task.total}"),
            BarColumn(24),
            TextColumn("{task.description}"),
            TimeRemainingColumn(),
        )
        self.progress = Progress(*columns, console=Screen(file=self.out))
        self.task = self.progress.add_task("", total=train_iters)
        self.progress.start()

    def on_step(self, iteration: int, metrics: dict[str, Any]) -> None:
        self.window = [*self.window[-19:], metrics]
        _, (tokens, trained) = self._rates()
        rates = f"{_short(tokens)} tok/s ({_short(trained)} trained)"
        loss = next((f"{m['train/loss']:.3f}" for m in reversed(self.window) if not m.get("train/empty")), "none")
        zeros = f"  zeros {metrics['train/sparsity']:.1%}" if "train/sparsity" in metrics else ""
        text = f"loss {loss}  grad {metrics['train/grad_norm']:.2f}{zeros}  {rates}"
        self.progress.update(self.task, completed=iteration, description=text)

    def on_end(self) -> None:
        self.progress.stop()

    def print(self, line: str) -> None:
        self.progress.console.print(line.strip(" |"), highlight=False, markup=False)


def duration(seconds: float) -> str:
    """Return HH:MM:SS, with days in front if there are any: 4 d 23:00:00."""
    minutes, second = divmod(int(seconds), 60)
    hours, minute = divmod(minutes, 60)
    days, hour = divmod(hours, 24)
    return (f"{days} d " if days else "") + f"{hour:02d}:{minute:02d}:{second:02d}"


def _short(number: float) -> str:
    return f"{number / 1000:.1f}k" if number >= 1000 else f"{number:.0f}"


def make_console(train_iters: int, log_interval: int) -> Console:
    """Return a live display on a terminal, plain lines elsewhere (and with TERM=dumb)."""
    live = sys.stdout.isatty() and os.environ.get("TERM") != "dumb"
    return (LiveConsole if live else Console)(train_iters, log_interval)
