"""Set before anything imports torch: tests start several processes on few cores, where threads are only in the way."""

import contextlib
import gc
import os
import signal

os.environ.setdefault("OMP_NUM_THREADS", "1")

# gloo's threads spin on a lock while the kernel has put its holder aside for another that wakes up. It does not do so to a batch process:
# an all-reduce of four processes on two cores takes half the processor time. What tests start inherits it.
if hasattr(os, "SCHED_BATCH"):
    with contextlib.suppress(OSError):  # a container may forbid it
        os.sched_setscheduler(0, os.SCHED_BATCH, os.sched_param(0))

# A shell starts a background job with Ctrl-C ignored, and so would be all that tests start, also those that are interrupted.
if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:
    signal.signal(signal.SIGINT, signal.default_int_handler)

import pytest
from hypothesis import HealthCheck, settings

# A busy machine is slow, which is no failure.
settings.register_profile("any machine", deadline=None, suppress_health_check=[HealthCheck.too_slow])
settings.load_profile("any machine")


LONG = ("parallel", "examples", "slurm", "demo", "errors", "generation")
"""Folders with files of a minute. They come first: at the end one worker would wait for the other."""


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Put long files first. Skip tests marked gpu where there is none; torch is imported only if some are."""
    items.sort(key=lambda item: item.path.parent.name not in LONG)
    marked = [item for item in items if item.get_closest_marker("gpu")]
    if not marked:
        return
    import torch

    if not torch.cuda.is_available():
        for item in marked:
            item.add_marker(pytest.mark.skip(reason="no CUDA device"))


def pytest_collection_finish() -> None:
    """What was collected stays to the end: the garbage collector need not read it again and again."""
    gc.freeze()


@pytest.fixture(scope="module")
def one_rank():
    """A pool of one rank, kept for the module; see tests/ranks.py."""
    yield from _ranks(1)


@pytest.fixture(scope="module")
def four_ranks():
    """A pool of four ranks, kept for the module."""
    yield from _ranks(4)


def _ranks(size: int):
    from tests.ranks import Ranks  # not above: it imports the engine, which most tests do without

    ranks = Ranks(size)
    yield ranks
    ranks.close()
