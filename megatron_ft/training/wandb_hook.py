"""Writes metrics to Weights & Biases, with the names in metrics.jsonl. An optional package."""

from __future__ import annotations

import atexit
import contextlib
import logging as log_lines
import sys
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

from megatron_ft.config.sections import Logging
from megatron_ft.errors import ConfigError
from megatron_ft.training.hooks import Hook, numbers
from megatron_ft.training.samples import COLUMNS, Sample, earlier


class WeightsAndBiases(Hook):
    """A wandb run with the resolved settings. Raise ConfigError if wandb is not installed or not logged in.

    wandb runs as a separate process. on_end does what wandb would do at the end of Python, which includes waiting for that process: if it
    hangs, the program can still end.
    """

    def __init__(self, logging: Logging, folder: Path | None, settings: dict[str, Any], resumed: bool = False):
        with _nothing_at_exit("wandb"):
            try:
                import wandb
            except ImportError as error:
                raise ConfigError("--wandb_logger needs wandb: pip install 'megatron_ft[logging]'") from error
            if folder:
                folder.mkdir(parents=True, exist_ok=True)
            try:
                self.run = wandb.init(
                    project=logging.wandb_project, name=logging.wandb_name, entity=logging.wandb_entity, id=logging.wandb_id,
                    resume="allow" if logging.wandb_id else None, dir=folder and str(folder), config=settings,
                )  # fmt: skip
            except (wandb.errors.UsageError, wandb.errors.AuthenticationError) as error:
                raise ConfigError(
                    f"--wandb_logger: {error} (or set WANDB_API_KEY; WANDB_MODE=offline logs to this machine alone)"
                ) from error
        self.table: Callable[..., Any] = wandb.Table
        self.rows: list[list[Any]] = [[at, *one.cells()] for at, one in earlier(folder if resumed else None)]
        """Of all samples so far, also of earlier starts: wandb shows the last table of a run."""
        self.teardown: Callable[[], None] = wandb.teardown

    def on_step(self, iteration: int, metrics: dict[str, Any]) -> None:
        self.run.log(dict(numbers(metrics)), step=iteration)

    on_eval = on_step

    def on_samples(self, iteration: int, samples: Sequence[Sample]) -> None:
        self.rows += [[iteration, *one.cells()] for one in samples]
        self.run.log({"samples": self.table(columns=["iteration", *COLUMNS], data=self.rows)}, step=iteration)

    def on_end(self) -> None:
        self.run.finish()
        self.teardown()

    def abandon(self) -> None:
        # It still reads what is printed, and would write a message to our log file for every line, because its service has ended.
        log_lines.getLogger("wandb").propagate = False


@contextlib.contextmanager
def _nothing_at_exit(package: str) -> Iterator[None]:
    """Keep a package from asking Python to call something at its end, and undo its changes of sys.exit and the like."""
    register, before = atexit.register, (sys.exit, sys.excepthook)

    def selective(function: Callable, *args: Any, **named: Any) -> Callable:
        theirs = (getattr(function, "__module__", None) or "").split(".")[0] == package
        return function if theirs else register(function, *args, **named)

    atexit.register = selective  # type: ignore[assignment]
    try:
        yield
    finally:
        atexit.register = register
        sys.exit, sys.excepthook = before
