"""Reasons to stop before the end: a signal from the scheduler, or gradients that stay broken.

SIGTERM and SIGUSR1 (what SLURM sends before it takes the nodes) let the current step finish; then all ranks save and leave with
EXIT_REQUEUE, which a launch script can requeue on.
"""

from __future__ import annotations

import signal

from megatron_ft import device
from megatron_ft.errors import UserError

EXIT_REQUEUE = 75
"""Stopped by a signal, everything saved: run the same command again. (EX_TEMPFAIL of sysexits.h)"""
SIGNALS = (signal.SIGTERM, signal.SIGUSR1)


class BrokenGradients(UserError):
    """Too many steps in a row whose gradients were not finite; the weights are those before them."""


class StopRequest:
    """Whether a signal asked this run to stop. A context manager: the handlers are taken down again."""

    def __init__(self):
        self.received: int | None = None
        self._before: dict[int, object] = {}

    def __enter__(self) -> StopRequest:
        self._before = {number: signal.signal(number, self._note) for number in SIGNALS}
        return self

    def __exit__(self, *_) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)

    def _note(self, number, frame) -> None:
        self.received = number

    def agreed(self) -> bool:
        """Whether any rank was asked to stop; all ranks call it and get the same answer."""
        import torch  # not above: signals are heeded from the start, before it is there
        import torch.distributed as dist

        asked = torch.tensor([int(self.received is not None)], device=device.current_device())
        dist.all_reduce(asked, op=dist.ReduceOp.MAX)
        return bool(asked.item())
