"""Launching: start the ranks, watch them, return one exit code. In a forked rank it returns at once."""

from __future__ import annotations

import shutil
import signal
import sys
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
from megatron_ft.launch.supervise import ReceivedSignals, supervise
from megatron_ft.log import setup


def planned(launching: Processes) -> Places | None:
    """Return the processes to start; None if this process is a rank already, or should be the only one."""
    return None if launching.nproc_per_node is None or is_rank() else places(launching)


def launch(here: Places, log_dir: str | None, prepare: Callable[[], None], reads_input: bool = False) -> int | None:
    """Start ranks that run this process's command, and wait for them. Return the exit code; in a forked rank return None.

    log_dir: folder of one log file per rank. prepare: called once before forking (imports the engine).
    reads_input: rank 0 has this process's standard input; else no rank has.
    """
    logs = Path(log_dir) if log_dir else None
    if logs is not None:
        logs.mkdir(parents=True, exist_ok=True)
    folder = Path(tempfile.mkdtemp(prefix="megatron_ft-ranks-"))
    ranks: list[Rank] | None = []
    link: Alone | None = None
    try:
        with ReceivedSignals() as received:
            with meeting_place(here) as (here, held):
                met = meet(here, held, lambda: bool(received.pending))
                if met is None:  # stopped before any rank was started
                    ranks = []
                    return 130 if signal.SIGINT in received.ever else EXIT_REQUEUE
                where, link = met
                ranks = start(
                    where, folder, logs is not None, prepare, None if held is None else held.fileno(), reads_input
                )
            if ranks is not None:
                if reads_input and sys.stdin.isatty():  # Ctrl-C ends an answer, not the program
                    received.leave_to_ranks(signal.SIGINT)
                return supervise(ranks, folder, received, Relay(ranks, logs), link)
    finally:
        if link is not None:
            link.close()
        if ranks is not None:  # not in a forked rank: the launcher removes it
            shutil.rmtree(folder, ignore_errors=True)
    setup()
    rank_errors.write_stack_on_signal()
    return None
