"""Progress of the pretokenizer on standard error: a bar on a terminal, else a line from time to time."""

import sys
import time
from typing import Any

from megatron_ft.log import logger

SHOWN = 5  # number of faulty records listed
EVERY = 15  # seconds between lines without a terminal
log = logger("pretokenize")


class Progress:
    """Shows progress; a context manager. total: number of samples to tokenize, as soon as it is known."""

    def __init__(self) -> None:
        self._bar: Any = None
        self._task: Any = None
        self._records = self._early = self._samples = self._tokens = self.total = 0
        self._started = self._printed = time.monotonic()

    def __enter__(self) -> "Progress":
        if sys.stderr.isatty():
            from rich.console import Console
            from rich.progress import BarColumn, Progress, TextColumn, TimeRemainingColumn

            columns = (TextColumn("{task.description}"), BarColumn(), TextColumn("{task.fields[rate]}"))
            self._bar = Progress(*columns, TimeRemainingColumn(), console=Console(stderr=True), transient=True)
            self._bar.start()
            self._task = self._bar.add_task("reading", total=None, rate="")
        return self

    def __exit__(self, *error: Any) -> None:
        if self._bar is not None:
            self._bar.stop()

    def read(self, records: int, tokens: int) -> None:
        """Add a number of counted records, and of the tokens that were made of them."""
        self._records, self._early = self._records + records, self._early + tokens
        seconds = max(time.monotonic() - self._started, 1e-9)
        rate = f", {_short(self._early / seconds)} tokens/s" if self._early else ""
        self._show("reading", f"{self._records:,} records{rate}", self._records)

    def begin(self, total: int) -> None:
        """Begin the tokenization of `total` samples."""
        self.total, self._started = total, time.monotonic()
        if self._bar is not None:
            self._bar.update(self._task, description="tokenizing", total=total, completed=0)

    def done(self, samples: int, tokens: int) -> None:
        """Add a number of tokenized samples and tokens."""
        self._samples, self._tokens = self._samples + samples, self._tokens + tokens
        seconds = max(time.monotonic() - self._started, 1e-9)
        rate = f"{_short(self._samples / seconds)} samples/s, {_short(self._tokens / seconds)} tokens/s"
        self._show("tokenizing", f"{self._samples:,} of {self.total:,} samples, {rate}", self._samples)

    def _show(self, what: str, rate: str, completed: int) -> None:
        if self._bar is not None:
            self._bar.update(self._task, completed=completed, rate=rate)
        elif time.monotonic() - self._printed > EVERY:
            self._printed = time.monotonic()
            log.info("%s: %s", what, rate)


def _short(number: float) -> str:
    return f"{number / 1e6:.2f}M" if number >= 1e6 else f"{number / 1e3:.1f}K" if number >= 1e3 else f"{number:.0f}"


def warn_skipped(messages: list[str], count: int, name: str) -> None:
    """Log the first of a dataset's skipped records, each with file and line, and the number of the others."""
    for message in messages[:SHOWN]:
        log.warning("skipped: %s", message)
    if count > SHOWN:
        log.warning("skipped: %d more faulty records of %s", count - SHOWN, name)
