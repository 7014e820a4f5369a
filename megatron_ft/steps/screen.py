"""The output of commands that run others: numbered steps with their commands, and a live progress line on a terminal."""

import shlex
import shutil
import sys
import time
from collections.abc import Sequence

from rich.console import Console
from rich.live import Live
from rich.text import Text

from megatron_ft.report import Metrics

WIDTH = 92
INDENT = " " * 6
_BARS = "▁▂▃▄▅▆▇█"


class Screen:
    """Prints plain lines if the output is not a terminal; colours follow NO_COLOR."""

    def __init__(self, steps: int):
        self.console = Console(highlight=False, soft_wrap=True, file=sys.stdout)
        self.steps, self.number = steps, 0
        self.started = time.monotonic()
        self.live: Live | None = None
        self.reported = 0

    def line(self, text: str = "", style: str = "") -> None:
        self.console.print(Text(text, style=style))

    def step(self, title: str) -> None:
        """Begin a step; done() returns its seconds."""
        self.number += 1
        self.started = time.monotonic()
        self.line(f"[{self.number}/{self.steps}] {title}", "bold")

    def command(self, words: Sequence[str]) -> None:
        for part in wrapped(words):
            self.line(f"{INDENT}{part}", "cyan")

    def done(self, text: str) -> float:
        """Print the step's result with its time at the right. Return the seconds."""
        seconds = time.monotonic() - self.started
        self.line(f"{INDENT}{text:{WIDTH - 12}}{clock(seconds):>6}")
        return seconds

    def note(self, text: str) -> None:
        self.line(f"{INDENT}{text}")

    def progress(self, metrics: Metrics, train_iters: int, every: int) -> None:
        """Show the progress of training: a live bar on a terminal, else a line every `every` iterations."""
        if not (losses := metrics.curve("train/loss")):
            return
        done = losses[-1][0]
        if self.console.is_terminal:
            if self.live is None:
                self.live = Live(console=self.console, transient=True, auto_refresh=False)
                self.live.start()
            self.live.update(Text(f"{INDENT}{_progress(metrics, train_iters, bar=True)}"), refresh=True)
        elif done // every > self.reported // every and done < train_iters:
            self.reported = done
            self.note(_progress(metrics, train_iters, bar=False))
            sys.stdout.flush()

    def stop_progress(self) -> None:
        if self.live:
            self.live.stop()
            self.live = None


def wrapped(words: Sequence[str]) -> list[str]:
    """Return a command as lines to paste: broken before flags, with backslashes."""
    groups: list[str] = []
    for i, word in enumerate(words):
        if i and words[i - 1].startswith("--") and not word.startswith("--"):
            groups[-1] += f" {shlex.quote(word)}"  # a flag stays with its value
        else:
            groups.append(shlex.quote(word))
    lines = ["$"]
    for group in groups:
        if len(lines[-1]) + 1 + len(group) > WIDTH - 10 and group.startswith("--"):
            lines[-1] += " \\"
            lines.append(f"    {group}")
        else:
            lines[-1] += f" {group}"
    return lines


def shortened(text: str, width: int) -> str:
    """Return the text as one line of at most `width` printable characters."""
    text = " ".join("".join(c if c.isprintable() else " " for c in text).split())
    return text if len(text) <= width else text[: width - 3] + "..."


def clock(seconds: float) -> str:
    """Return the time as m:ss."""
    return f"{int(seconds + 0.5) // 60}:{int(seconds + 0.5) % 60:02d}"


def sparkline(values: Sequence[float], width: int = 12) -> str:
    """Return a curve of the values in `width` characters."""
    width = min(width, len(values))
    picked = [values[i * (len(values) - 1) // max(1, width - 1)] for i in range(width)]
    low, high = min(picked, default=0), max(picked, default=0)
    return "".join(_BARS[round((value - low) / ((high - low) or 1) * (len(_BARS) - 1))] for value in picked)


def thousands(value: float) -> str:
    return f"{value / 1000:.1f}k" if value >= 1000 else f"{value:.0f}"


def active_hint() -> str | None:
    """Return the command that makes `megatron-ft` available in the shell, None if it is."""
    return None if shutil.which("megatron-ft") else "source .venv/bin/activate"


def _progress(metrics: Metrics, train_iters: int, bar: bool) -> str:
    done, loss = metrics.curve("train/loss")[-1]
    recent = metrics.values("train/seconds")[-20:]
    seconds = sum(recent)
    rates = [sum(metrics.values(name)[-20:]) / seconds for name in ("train/tokens", "train/supervised_tokens")]
    full = 22 * done // train_iters
    drawn = f"{'━' * full}{'╌' * (22 - full)} " if bar else " "
    norm = metrics.values("train/grad_norm")[-1]
    left = clock((train_iters - done) * seconds / len(recent))
    return (
        f"{done:>{len(str(train_iters))}}/{train_iters} {drawn}loss {loss:.3f}  grad {norm:.2f}  "
        f"{thousands(rates[0])} tok/s ({thousands(rates[1])} trained)  eta {left}"
    )
