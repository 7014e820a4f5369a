"""A signal that reaches a rank in the moment of its start is not lost: SLURM signals all processes of a step at once."""

import os
import signal
import sys
import threading

import pytest

from megatron_ft.launch import ranks
from megatron_ft.launch.places import Places
from megatron_ft.launch.supervise import ReceivedSignals


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGUSR1])
def test_between_the_fork_and_the_ranks_own_handlers(number, tmp_path, monkeypatch):
    """The child gets the signal before it has done anything at all."""
    fork = os.fork

    def signalled() -> int:
        pid = fork()
        if not pid:
            os.kill(os.getpid(), number)
        return pid

    monkeypatch.setattr(os, "fork", signalled)
    with ReceivedSignals() as received:
        rank = ranks._fork(here(), 0, tmp_path, False, None, [], False)
        if rank is None:
            os._exit(7)  # the rank goes on as if nothing had been
        assert code_of(rank) == -number
    assert not received.ever


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGUSR1])
def test_in_a_rank_that_is_started_anew(number, tmp_path, monkeypatch):
    """As on machines with GPUs; the signal comes before the new program has begun."""
    begin = ranks._begin_as_child

    def signalled() -> None:
        os.kill(os.getpid(), number)
        begin()

    monkeypatch.setattr(ranks, "_begin_as_child", signalled)
    monkeypatch.setattr(sys, "orig_argv", [sys.executable, "-c", "import time; time.sleep(60)"])
    with ReceivedSignals():
        assert code_of(ranks._spawn(here(), 0, tmp_path, False, None, False)) == -number


def test_what_the_launcher_gets_meanwhile_it_passes_on(tmp_path):
    """Signals are held back while a rank is started, and come afterwards."""
    with ReceivedSignals() as received:
        with ranks._signals_held_back():
            signal.pthread_kill(threading.get_ident(), signal.SIGTERM)  # another thread would take the process's
            assert not received.ever
        assert received.pending == [signal.SIGTERM]


def test_a_started_program_can_be_signalled(tmp_path, monkeypatch):
    """Nothing stays blocked in it."""
    script = "import signal; print(signal.pthread_sigmask(signal.SIG_BLOCK, []), signal.getsignal(signal.SIGTERM))"
    monkeypatch.setattr(sys, "orig_argv", [sys.executable, "-c", script])
    rank = ranks._spawn(here(), 0, tmp_path, True, None, False)
    assert code_of(rank) == 0
    said = os.read(rank.outputs[1], 1000).decode()
    assert said == "set() 0\n"  # nothing is blocked, the default handler


def here() -> Places:
    return Places(here=1, nodes=1, node=0, address="localhost", port=29999)


def code_of(rank: ranks.Rank) -> int:
    _, status = os.waitpid(rank.pid, 0)
    return os.waitstatus_to_exitcode(status)
