"""Asks the model in training without risk for the run: what fails on one rank is left out on all of them."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Protocol

import torch
import torch.distributed as dist

from megatron_ft import device
from megatron_ft.config.rank_errors import is_loss
from megatron_ft.training.guard import give_up
from megatron_ft.training.samples import Sample, Sampler


class Asked(Protocol):
    """Prompts that a model answers in two steps, so that a rank whose part of the first one fails does not keep the others waiting."""

    def answers(self) -> list[str]: ...
    def gather(self, mine: list[str]) -> Sequence[Sample]: ...


def careful(name: str, asked: Asked) -> Sampler:
    """Return a sampler that answers nothing more once it has failed on any rank, and says so in one line. name: its name for the user.

    An error that another process of the run caused by ending is raised.
    """
    working = True

    def sample() -> Sequence[Sample]:
        nonlocal working
        if not working:
            return ()
        mine: list[str] = []
        problem = None
        try:
            mine = asked.answers()
        except Exception as error:
            if is_loss(error):
                raise
            problem = error
            give_up(name, error)
        working = all_well(problem is None)
        return asked.gather(mine) if working else ()

    return sample


def all_well(here: bool) -> bool:
    """Return whether all is well on every rank. A collective: all ranks call it."""
    flag = torch.tensor([int(here)], device=device.current_device())
    dist.all_reduce(flag, op=dist.ReduceOp.MIN)
    return bool(flag.item())
