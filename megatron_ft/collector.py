"""When the garbage collector runs: not while modules are imported, seldom while data is read."""

import contextlib
import gc
from collections.abc import Iterator

SELDOM = 200_000  # new objects between two collections


@contextlib.contextmanager
def no_collection() -> Iterator[None]:
    """Run imports without the garbage collector, and have it leave alone afterwards what they made.

    Modules live as long as the process. The collector would read all their objects many times during the imports (a fifth of the time
    they take), and again in each process forked later, where the kernel copies every page that it marks.
    """
    was_enabled = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        gc.freeze()
        if was_enabled:
            gc.enable()


@contextlib.contextmanager
def few_collections() -> Iterator[None]:
    """Collect seldom: what is made of records has no cycles and is freed without it. Processes forked inside do the same."""
    before = gc.get_threshold()
    gc.set_threshold(SELDOM, *before[1:])
    try:
        yield
    finally:
        gc.set_threshold(*before)
