"""Launchers of several machines, run on one machine: one of them names the cause, and all end together."""

import json
import os
import signal
import socket
import subprocess
import sys
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from benchmarks.ports import free_port
from megatron_ft.config.sections import Launching
from megatron_ft.errors import ConfigError
from megatron_ft.launch.blame import Sureness
from megatron_ft.launch.judge import Report
from megatron_ft.launch.meeting import meeting_place
from megatron_ft.launch.nodes import Alone, meet
from megatron_ft.launch.places import places
from tests.errors.conftest import ROOT, finetune
from tests.errors.test_before_torch import layout
from tests.errors.test_launcher import TROUBLE

DEADLINE = 20.0


@pytest.fixture
def port() -> int:
    return free_port()


def come(node: int, port: int, nodes: int = 2, processes: int = 1, interrupted=lambda: False):
    """Connect one launcher to the others."""
    told = Launching(nproc_per_node=processes, nnodes=nodes, node_rank=node, master_addr="localhost", master_port=port)
    with meeting_place(places(told)) as (here, held):
        return meet(here, held, interrupted)


def together(*callers):
    """Call all at the same time. Return the result or the error of each."""
    with ThreadPoolExecutor(len(callers)) as pool:
        futures = [pool.submit(one) for one in callers]
        return [future.exception(timeout=60) or future.result() for future in futures]


def until(holds, links) -> None:
    deadline = time.monotonic() + DEADLINE
    while not holds():
        assert time.monotonic() < deadline
        for link in links:
            link.poll()
        time.sleep(0.01)


def meeting(port: int, nodes: int = 3) -> list[Alone]:
    met = together(*(lambda node=node: come(node, port, nodes) for node in range(nodes)))
    assert len({where.port for where, _ in met}) == 1 and met[0][0].port != port
    return [link for _, link in met]


def test_all_learn_the_reporter_and_end_with_one_code(port):
    links = meeting(port)
    links[1].trouble()
    until(lambda: all(link.news.trouble for link in links), links)
    links[1].found(Sureness.NOTHING)
    links[2].found(Sureness.SURE)
    until(lambda: all(link.news.reporter == 2 for link in links), links)
    for link, codes in zip(links, [(1,), (1,), (-9,)], strict=True):
        link.ended(Report(codes, stop_requested=True))
    until(lambda: all(link.news.code == 1 for link in links), links)


def test_a_launcher_that_goes(port):
    """Node 0 names it. If the launcher of node 0 ends, each of the others names it and decides for itself."""
    first, second, third = meeting(port)
    second.close()
    until(lambda: first.news.trouble and third.news.trouble, [first, third])
    assert f"the launcher of node 1 ({socket.gethostname()}) does not respond" in first.gone()
    first.close()
    until(lambda: third.news.trouble and third.gone() is not None, [third])
    assert "the launcher of node 0 (localhost:" in third.gone()
    third.found(Sureness.NOTHING)
    third.ended(Report((1,), lost=True))
    until(lambda: third.news.code == 1, [third])
    assert third.news.reporter == 2


def test_launchers_that_do_not_belong_together(port):
    """Both raise the same message with the difference."""
    first, second = together(lambda: come(0, port, processes=8), lambda: come(1, port, processes=4))
    assert isinstance(first, ConfigError) and isinstance(second, ConfigError)
    assert str(first) == str(second) and "--nproc_per_node 4" in str(first) and "--nproc_per_node 8" in str(first)


def test_other_programs_at_the_port_are_ignored(port):
    """A connection that sends nothing, or other data, is closed soon and does not count as a launcher."""
    words = [b"", b"GET / HTTP/1.0\r\n\r\n", b'{"node": "x"}\n', b"\xff\xfe\n", b"[1]\n"]

    def strangers():
        for word in words:
            deadline = time.monotonic() + DEADLINE
            while True:
                try:
                    with socket.create_connection(("localhost", port), timeout=5) as one:
                        one.sendall(word)
                    break
                except ConnectionRefusedError:
                    assert time.monotonic() < deadline
                    time.sleep(0.05)
        return come(1, port)

    first, second = together(lambda: come(0, port), strangers)
    assert not isinstance(first, Exception) and not isinstance(second, Exception), (first, second)


def test_a_stop_signal_while_waiting_for_the_others(port):
    stop = threading.Event()
    threading.Timer(0.5, stop.set).start()
    assert together(lambda: come(0, port, interrupted=stop.is_set), lambda: None)[0] is None
    assert come(1, port, interrupted=stop.is_set) is None


def test_the_port_of_the_meeting_is_taken():
    with (
        socket.create_server(("", 0)) as taken,
        pytest.raises(ConfigError, match="choose a free one with --master_port"),
    ):
        come(0, taken.getsockname()[1])


LATE = """
code = main()
if "RANK" not in os.environ:
    os.kill(os.getpid(), signal.SIGTERM)
sys.exit(code)
"""


def run(shop, tmp_path: Path, port: int, what: str, *more) -> list[subprocess.Popen]:
    """Two launchers of two ranks each, TP2 x PP2. Rank 1 does `what` before its third step. A launcher that has nothing left to do gets
    a SIGTERM, as srun's --kill-on-bad-exit sends it to those that are still there when the first leaves.
    """
    program = TROUBLE.format(what).replace("sys.exit(main())", LATE)
    clean = {
        name: value for name, value in os.environ.items() if not name.startswith(("RANK", "WORLD", "MASTER", "SLURM"))
    }
    started = []
    for node in range(2):
        words = finetune(shop, shop.split, None, tmp_path / "run", *layout(2, 2), iters=500)
        words += ["--nproc_per_node", 2, "--nnodes", 2, "--node_rank", node]
        words += ["--master_addr", "localhost", "--master_port", port]
        started.append(
            subprocess.Popen(
                [sys.executable, "-c", program, *map(str, [*words, *more])], cwd=ROOT, text=True,
                stdout=subprocess.PIPE, stderr=subprocess.PIPE,
                env={**clean, "OMP_NUM_THREADS": "1", "MEGATRON_FT_DEVICE": "cpu"},
            )
        )  # fmt: skip
    return started


def ends(started) -> tuple[list[int], str]:
    """Return the exit codes and all error output."""
    said = together(*(lambda one=one: one.communicate(timeout=120)[1] for one in started))
    return [one.returncode for one in started], "".join(said)


def test_a_rank_killed_on_one_machine(shop, tmp_path, port):
    """Its launcher names it. The other one prints nothing and does not count the run as saved."""
    codes, said = ends(run(shop, tmp_path, port, "os.kill(os.getpid(), signal.SIGKILL)"))
    errors = [line for line in said.splitlines() if ": error: " in line]
    assert codes == [1, 1]
    assert len(errors) == 1 and "rank 1 (process " in errors[0] and "SIGKILL" in errors[0], said


def test_a_launcher_is_killed_while_a_rank_does_not_wait(shop, tmp_path, port):
    """The killed launcher is named. No rank is suspected that might still reach the call."""
    here = tmp_path / "here"
    first, second = started = run(shop, tmp_path, port, f"open({str(here)!r}, 'w'), time.sleep(60)")
    deadline = time.monotonic() + 60
    while not here.exists():
        assert time.monotonic() < deadline and first.poll() is None
        time.sleep(0.05)
    second.kill()
    codes, said = ends(started)
    errors = [line for line in said.splitlines() if ": error: " in line]
    assert codes == [1, -signal.SIGKILL]
    assert len(errors) == 1 and f"the launcher of node 1 ({socket.gethostname()}) does not respond" in errors[0], said


def test_a_signal_to_one_machine_s_launcher(shop, tmp_path, port):
    """All ranks save. Both launchers end with 75, and the checkpoint is that of the last step."""
    started = run(shop, tmp_path, port, "pass")
    metrics = tmp_path / "run" / "metrics.jsonl"
    deadline = time.monotonic() + 60
    while not metrics.exists() or len(metrics.read_text().splitlines()) < 3:
        assert time.monotonic() < deadline and started[0].poll() is None
        time.sleep(0.05)
    started[1].send_signal(signal.SIGTERM)
    codes, said = ends(started)
    assert codes == [75, 75] and ": error: " not in said, said
    last = [json.loads(line) for line in metrics.read_text().splitlines() if "iteration" in line][-1]["iteration"]
    assert (tmp_path / "run" / "latest_checkpointed_iteration.txt").read_text().strip() == str(last)
