"""Reasons to stop before the end: a signal from the scheduler, a time limit, or gradients that remain not finite.

After SIGTERM or SIGUSR1 (which SLURM sends before it ends the job) the current step finishes. Then all ranks save and end with
EXIT_REQUEUE, on which a launch script can requeue.
"""

from __future__ import annotations

import dataclasses
import os
import signal
import time
from typing import Any

from megatron_ft import device
from megatron_ft.config.sections import Stopping
from megatron_ft.errors import UserError

EXIT_REQUEUE = 75
"""Stopped by a signal or the time limit, everything saved: run the same command again. (EX_TEMPFAIL of sysexits.h)"""
SIGNALS = (signal.SIGTERM, signal.SIGUSR1)


class BrokenGradients(UserError):
    """Too many steps in a row whose gradients were not finite; the weights are those before them."""


class MostlySkipped(UserError):
    """The run has reached its last step, and most of its steps changed nothing."""


@dataclasses.dataclass
class Skipped:
    """Steps of this start that changed nothing, by reason: gradients that are not finite, none to train on, overflow of a dynamic scale."""

    steps: int = 0
    broken: int = 0
    empty: int = 0
    overflow: int = 0

    def count(self, metrics: dict[str, Any]) -> bool:
        """Count a step. Return whether its gradients were not finite for another reason than a loss scale that finds its height."""
        self.steps += 1
        if not metrics["train/skipped"]:
            return False
        reason = next((name for name in ("overflow", "empty") if metrics[f"train/{name}"]), "broken")
        setattr(self, reason, getattr(self, reason) + 1)
        return reason == "broken"

    def judge(self, lr: float) -> str | None:
        """Return what to say if most steps were skipped by overflows. Raise MostlySkipped if most were for another reason."""
        remedies = {
            "broken": (
                f"with gradients that are not finite: start again with a lower --lr (it was {lr:g})",
                self.broken,
            ),
            "empty": (
                "without a token to train on: check the loss weights and the shards with megatron-ft preflight",
                self.empty,
            ),
        }
        if 2 * (self.broken + self.empty) > self.steps:
            why = ", ".join(f"{number} {text}" for text, number in remedies.values() if number)
            raise MostlySkipped(
                f"{self.broken + self.empty} of {self.steps} steps were skipped and changed nothing, so the model is hardly trained; {why}"
            )
        if 2 * (self.broken + self.empty + self.overflow) > self.steps:
            return (
                f"{self.overflow} of {self.steps} steps were skipped while the fp16 loss scale was too high; train longer, use --bf16, or "
                f"lower --initial_loss_scale"
            )
        return None


def time_limit(section: Stopping) -> float | None:
    """Return the time to save and stop (seconds since the epoch): --exit_duration_in_mins from now, or so long before the SLURM job's
    end.
    """
    limits = []
    if section.exit_duration_in_mins is not None:
        limits.append(time.time() + 60 * section.exit_duration_in_mins)
    end = os.environ.get("SLURM_JOB_END_TIME", "")
    if section.exit_before_end_in_mins and end.isdigit():
        limits.append(int(end) - 60 * section.exit_before_end_in_mins)
    return min(limits, default=None)


class StopRequest:
    """Records whether a signal or a time limit requests that this run stops. A context manager, which restores the handlers.

    until: a time (seconds since the epoch) from which to stop. every: stop after an iteration that this divides.
    """

    def __init__(self, until: float | None = None, every: int | None = None):
        self.received: int | None = None
        self.until, self.every = until, every
        self.reason, self.exit_code = "stopped by a signal", EXIT_REQUEUE
        self._before: dict[int, Any] = {}

    def __enter__(self) -> StopRequest:
        self._before = {number: signal.signal(number, self._note) for number in SIGNALS}
        return self

    def __exit__(self, *_: object) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)

    def _note(self, number: int, frame: object) -> None:
        self.received = number

    def agreed(self, iteration: int = 0) -> bool:
        """Return whether to stop after `iteration`, because any rank got a signal; all ranks call it and get the same answer.

        reason and exit_code then say why and how to leave.
        """
        import torch.distributed as dist  # not above: signals are handled from the start, before torch is imported

        late = self.until is not None and time.time() >= self.until
        asked = device.handed([int(self.received is not None), int(late)])
        dist.all_reduce(asked, op=dist.ReduceOp.MAX)
        signalled, late = asked.tolist()
        if late and not signalled:
            self.reason = "stopped by its time limit"
        if not signalled and not late and self.every and iteration and iteration % self.every == 0:
            self.reason, self.exit_code = f"stopped by --exit_interval {self.every}", 0
            return True
        return bool(signalled or late)
