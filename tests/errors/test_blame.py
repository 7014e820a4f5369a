"""The launcher finds the rank that caused a failure, also if the signs come late and in another order."""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from megatron_ft.config import rank_errors
from megatron_ft.launch.blame import DOUBT, LIMIT, CauseFinder, Sureness
from megatron_ft.launch.ranks import Rank
from tests.errors.conftest import ROOT

PROGRAM = """
import sys, threading, time
from megatron_ft.config import rank_errors
rank_errors.write_stack_on_signal()
{}
print(flush=True)
time.sleep(100)
"""
WAITS = "from torch.distributed import somewhere"
"""Code of a rank that waits for others: the innermost calls are in a file of torch/distributed."""
COMPUTES = "threading.Thread(target=time.sleep, args=(100,), daemon=True).start()"


class Late(Rank):
    """A rank whose end is seen only after `looks` polls. On a busy machine a killed process ends much later."""

    looks = 0
    then: int | None = None

    def poll(self):
        self.looks -= 1
        if self.looks < 0:
            self.code = self.then
        return self.code


def dying(number: int, code: int, looks: int) -> Late:
    rank = Late(number, pid=0)
    rank.looks, rank.then = looks, code
    return rank


def lost(folder: Path, number: int, at: float = 1.0, reason: str = "Connection closed by peer") -> None:
    (folder / f"lost-{number}").write_text(json.dumps({"at": at, "reason": reason}))


def begun(ranks, folder: Path, received=()) -> CauseFinder:
    finder = CauseFinder(ranks, folder, set(received))
    finder.began = 0.0
    return finder


@pytest.fixture
def process(tmp_path, monkeypatch):
    """Start a process that writes its stack on the signal. Return its rank."""
    started = []

    def start(number: int, what: str = "pass") -> Rank:
        fake = tmp_path / "torch" / "distributed"
        fake.mkdir(parents=True, exist_ok=True)
        for package in (fake.parent, fake):
            (package / "__init__.py").touch()
        (fake / "somewhere.py").write_text("import time; print(flush=True); time.sleep(100)")
        environment = {
            **os.environ,
            "PYTHONPATH": f"{tmp_path}:{ROOT}",
            rank_errors.FOLDER: str(tmp_path),
            "RANK": str(number),
        }
        words = [sys.executable, "-c", PROGRAM.format(what)]
        one = subprocess.Popen(words, env=environment, stdout=subprocess.PIPE)
        one.stdout.readline()
        started.append(one)
        return Rank(number, one.pid)

    yield start
    for one in started:
        one.kill()
        one.communicate(timeout=30)


@pytest.mark.parametrize("looks", [0, 1, 5])
def test_a_death_that_is_seen_after_its_consequences(looks, tmp_path):
    ranks = [Rank(0, 0, code=1), dying(1, -signal.SIGKILL, looks)]
    lost(tmp_path, 0)
    finder = begun(ranks, tmp_path)
    found = None
    for look in range(20):
        for rank in ranks:
            rank.poll() if isinstance(rank, Late) else None
        found = found or finder.look(0.05 * look)
    assert (
        found.sureness is Sureness.SURE and found.line.startswith("rank 1 (process 0 on ") and "SIGKILL" in found.line
    )


def test_a_rank_that_is_about_to_print_an_error_is_waited_for(tmp_path):
    """Its connections are closed, its traceback is not printed yet."""
    ranks = [Rank(0, 0, code=1), dying(1, 1, 10**6)]
    lost(tmp_path, 0)
    (tmp_path / "failing-1").touch()
    finder = begun(ranks, tmp_path)
    assert finder.look(DOUBT + 1) is None
    (tmp_path / "reported-first").touch()
    found = finder.look(DOUBT + 2)
    assert (found.sureness, found.line) == (Sureness.SURE, None)


@pytest.mark.parametrize(
    "code, words", [(3, "ended with exit code 3 without an error message"), (-11, "was ended by SIGSEGV")]
)
def test_a_rank_that_ends_without_an_error_message(code, words, tmp_path):
    ranks = [Rank(0, 0, code=1), Rank(1, 0, code=code)]
    lost(tmp_path, 0)
    assert words in begun(ranks, tmp_path).look(0.0).line


def test_consequences_are_no_causes(tmp_path):
    """Losses, aborts of the libraries, ranks that the launcher killed, and ranks that received SIGTERM."""
    ranks = [
        Rank(0, 0, code=1),
        Rank(1, 0, code=-signal.SIGABRT),
        Rank(2, 0, code=-9, killed=True),
        Rank(3, 0, code=-15),
    ]
    lost(tmp_path, 0)
    lost(tmp_path, 1, at=0.5, reason="Timed out")
    finder = begun(ranks, tmp_path, received=[signal.SIGTERM])
    assert finder.conclude().sureness is Sureness.NOTHING
    assert finder.loss().startswith("rank 1 on ") and "Timed out" in finder.loss()  # of the first loss


def test_a_library_s_abort_is_named_where_nothing_else_is_known(tmp_path):
    found = begun([Rank(0, 0, code=-signal.SIGABRT), Rank(1, 0, code=-9, killed=True)], tmp_path).conclude()
    assert found.sureness is Sureness.SUSPECT and "rank 0 (process 0 on " in found.line and "SIGABRT" in found.line


def _until_found(finder: CauseFinder):
    began = time.monotonic()
    while (found := finder.look(time.monotonic() - began)) is None:
        assert time.monotonic() - began < 3 * LIMIT
        time.sleep(0.05)
    return found


def test_the_rank_that_does_not_wait_is_the_suspect(tmp_path, process):
    """Rank 1 waits for others and rank 2 computes, so rank 2 is the suspect. Its main thread is shown first."""
    ranks = [Rank(0, 0, code=1), process(1, WAITS), process(2, COMPUTES)]
    lost(tmp_path, 0)
    found = _until_found(begun(ranks, tmp_path))
    assert (
        found.sureness is Sureness.SUSPECT
        and found.line.startswith("rank 2 (process ")
        and "did not reach the call" in found.line
    )
    assert found.stack.startswith("Current thread") and "in <module>" in found.stack.split("\n\n")[0]


def asked_while_stopped(tmp_path, process) -> tuple[Rank, CauseFinder]:
    """Stop rank 1; rank 0 has lost another one, so the stack of rank 1 is requested."""
    stopped = process(1)
    os.kill(stopped.pid, signal.SIGSTOP)
    os.waitid(os.P_PID, stopped.pid, os.WSTOPPED)
    finder = begun([Rank(0, 0, code=1), stopped], tmp_path)
    lost(tmp_path, 0)
    assert finder.look(1.0) is None
    return stopped, finder


def test_a_stopped_rank_is_the_suspect(tmp_path, process):
    """It is continued to write its stack. If it then loses the others or ends, it remains the suspect."""
    _, finder = asked_while_stopped(tmp_path, process)
    lost(tmp_path, 1)
    deadline = time.monotonic() + 30
    while not (tmp_path / "stack-1").read_text():
        assert time.monotonic() < deadline
        time.sleep(0.05)
    found = finder.conclude()
    assert (
        found.sureness is Sureness.SUSPECT and found.line.startswith("rank 1 (process ") and "is stopped" in found.line
    )


@pytest.mark.parametrize("number", [signal.SIGSEGV, signal.SIGBUS, signal.SIGKILL, signal.SIGTERM])
def test_a_stopped_rank_that_ends_when_it_is_continued(number, tmp_path, process):
    stopped, finder = asked_while_stopped(tmp_path, process)
    stopped.send(number)
    os.waitid(os.P_PID, stopped.pid, os.WEXITED | os.WNOWAIT)
    stopped.poll()
    found = finder.look(1.1) or finder.conclude()
    assert found.line.startswith("rank 1 (process ") and "is stopped" in found.line


def test_a_rank_that_crashes_while_it_writes_its_stack(tmp_path, process):
    """The rank that does not wait is named, not the crashed one, whose stack was requested too."""
    ranks = [Rank(0, 0, code=1), process(1, WAITS), process(2, COMPUTES)]
    finder = begun(ranks, tmp_path)
    lost(tmp_path, 0)
    assert finder.look(1.0) is None
    ranks[1].send(signal.SIGSEGV)
    os.waitid(os.P_PID, ranks[1].pid, os.WEXITED | os.WNOWAIT)
    ranks[1].poll()
    found = _until_found(finder)
    assert found.sureness is Sureness.SUSPECT and found.line.startswith("rank 2 (process ")


def test_a_crash_before_any_stack_was_requested_is_the_cause(tmp_path, process):
    finder = begun([Rank(0, 0, code=-signal.SIGSEGV), process(1, WAITS)], tmp_path)
    assert finder.look(1.0).line.startswith("rank 0 (process 0 on ")


def test_all_ranks_wait(tmp_path, process):
    """The cause is on another machine."""
    lost(tmp_path, 0)
    found = _until_found(begun([Rank(0, 0, code=1), process(1, WAITS)], tmp_path))
    assert (found.sureness, found.line) == (Sureness.NOTHING, None)


def test_what_counts_as_a_loss():
    """Messages of a lost process count. A file server that does not respond, or a bug, is the process's own error."""
    gloo = "[gloo/transport/tcp/pair.cc:547] Connection closed by peer [127.0.0.1]:4711"
    assert rank_errors.is_loss(RuntimeError(gloo)) and rank_errors.is_loss(
        RuntimeError("Timed out waiting 6000ms for recv operation")
    )
    assert not rank_errors.is_loss(RuntimeError("the cat sat on it"))
    assert not rank_errors.is_loss(TimeoutError(110, "Connection timed out", "/nfs/model.bin"))
    try:
        raise ConnectionResetError(104, "Connection reset by peer")  # not raised in torch.distributed
    except OSError as error:
        assert not rank_errors.is_loss(error)
