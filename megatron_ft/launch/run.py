"""The whole of launching: start the ranks, watch them, end with one exit code. In a rank that was forked it returns at once."""

from __future__ import annotations

import shutil
import signal
import tempfile
from collections.abc import Callable
from pathlib import Path

from megatron_ft.config import rank_errors
from megatron_ft.config.sections import Processes
from megatron_ft.launch.blame import EXIT_REQUEUE
from megatron_ft.launch.meeting import meeting_place
from megatron_ft.launch.nodes import Alone, meet
from megatron_ft.launch.output import Relay
from megatron_ft.launch.places import Places, is_rank, places
from megatron_ft.launch.ranks import Rank, start
from megatron_ft.launch.supervise import Asked, supervise
from megatron_ft.log import setup


def planned(launching: Processes) -> Places | None:
    """The processes to start; None where there is nothing to start: this process is one of several already, or to be alone."""
    return None if launching.nproc_per_node is None or is_rank() else places(launching)


def launch(here: Places, log_dir: str | None, prepare: Callable[[], None]) -> int | None:
    """Start ranks that do what this process was about to do, and wait for them.

    log_dir: gets a file for each rank. prepare: what ranks that are forked need in common (importing the engine).
    Returns the exit code; in a forked rank None: it goes on.
    """
    logs = Path(log_dir) if log_dir else None
    if logs is not None:
        logs.mkdir(parents=True, exist_ok=True)
    folder = Path(tempfile.mkdtemp(prefix="megatron_ft-ranks-"))
    ranks: list[Rank] | None = []
    link: Alone | None = None
    try:
        with Asked() as asked:
            with meeting_place(here) as (here, held):
                met = meet(here, held, lambda: bool(asked.numbers))
                if met is None:  # told to stop before there was anything
                    ranks = []
                    return 130 if signal.SIGINT in asked.ever else EXIT_REQUEUE
                where, link = met
                ranks = start(where, folder, logs is not None, prepare, None if held is None else held.fileno())
            if ranks is not None:
                return supervise(ranks, folder, asked, Relay(ranks, logs), link)
    finally:
        if link is not None:
            link.close()
        if ranks is not None:  # in a rank it is the launcher's to remove
            shutil.rmtree(folder, ignore_errors=True)
    setup()
    rank_errors.be_seen()
    return None
