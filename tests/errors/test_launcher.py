"""Processes started with --nproc_per_node: one raises, one is killed, one is stopped, one hangs. The launcher's exit code, the time it
takes, and what a user reads first.
"""

import os
import signal
import socket
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import pytest

from megatron_ft.config.sections import Launching
from megatron_ft.engine import parallel
from megatron_ft.errors import ConfigError
from megatron_ft.launch.judge import exit_code
from megatron_ft.launch.meeting import meeting_place
from megatron_ft.launch.places import is_rank, join_srun, places
from megatron_ft.launch.stacks import is_waiting, oldest_first
from tests.errors.conftest import copy, cut, engine_desk, finetune
from tests.errors.test_before_torch import layout

SLACK = 8.0
"""Additional seconds, because the tests share few cores with other programs."""

TROUBLE = """
import os, signal, sys, time, warnings
warnings.simplefilter("ignore")
from megatron_ft.training import step

update, calls = step.update, []

def trouble(optimizer):
    calls.append(1)
    if len(calls) == 3 and os.environ["RANK"] == "1":
        {}
    return update(optimizer)

step.update = trouble
from megatron_ft.__main__ import main
sys.argv = ["megatron-ft", *sys.argv[1:]]
sys.exit(main())
"""


PLAIN = "import sys; from megatron_ft.__main__ import main; sys.exit(main(sys.argv[1:]))"


def start(program: str, *words, **environment) -> SimpleNamespace:
    """Run a program on the desk of the engine: code, out, err, and the time (s) at which the launcher ended."""
    done = engine_desk()(*words, program=program, env=environment, patience=150)
    return SimpleNamespace(code=done.code, out=done.out, err=done.err, ended=time.time())


def trouble(what: str, tmp_path: Path, shop, *more) -> SimpleNamespace:
    """Four ranks, TP2 x PP2; rank 1 does `what` before it takes its third step. since: when that was."""
    mark = tmp_path / "mark"
    program = TROUBLE.format(f"open({str(mark)!r}, 'w').close(); {what}")
    done = start(
        program, *finetune(shop, shop.split, None, None, *layout(2, 2), "--nproc_per_node", 4, *more, iters=50)
    )
    done.seconds = done.ended - mark.stat().st_mtime
    return done


def said(done) -> list[str]:
    """Return the error lines and the lines after them."""
    lines = done.err.splitlines()
    return lines[next(n for n, line in enumerate(lines) if ": error: " in line) :]


def test_one_rank_raises(shop, tmp_path):
    done = trouble("raise RuntimeError('the cat sat on it')", tmp_path, shop)
    lines = said(done)
    assert done.code == 1
    assert lines[0] == "megatron-ft finetune: error: rank 1 failed:" and lines[-1] == "RuntimeError: the cat sat on it"
    assert done.err.count("Traceback") == 1 and done.err.count(": error: ") == 1
    assert done.seconds < 5 + SLACK


def test_one_rank_is_killed(shop, tmp_path):
    done = trouble("os.kill(os.getpid(), signal.SIGKILL)", tmp_path, shop)
    assert done.code == 1
    assert len(said(done)) == 1 and "error: rank 1 (process " in said(done)[0] and "ended by SIGKILL" in said(done)[0]
    assert "Traceback" not in done.err
    assert done.seconds < 5 + SLACK


@pytest.mark.parametrize(
    "what, message",
    [
        ("os.kill(os.getpid(), signal.SIGSTOP)", "is stopped and does not respond"),
        ("time.sleep(1000)", "did not reach the call in which the others waited for it"),
    ],
    ids=["stopped", "hangs"],
)
def test_one_rank_is_silent(what, message, shop, tmp_path):
    """The others wait 6 s. The first line names the rank, the next ones are its stack."""
    done = trouble(what, tmp_path, shop, "--distributed_timeout_minutes", 0.1)
    lines = said(done)
    assert done.code == 1
    assert lines[0].startswith("megatron-ft: error: rank 1 (process ") and message in lines[0]
    assert any("in trouble" in line for line in lines[1:6]), "\n".join(lines)
    assert "timed out" not in done.err.lower()
    assert done.seconds < 2 * 6 + 5 + SLACK  # a wait may begin when another one ends


def test_ctrl_c(shop, tmp_path):
    """The terminal sends SIGINT to the launcher and the ranks: one line, no diagnosis, no stack, and all end at once."""
    done = trouble("[os.kill(pid, signal.SIGINT) for pid in (os.getppid(), os.getpid())]", tmp_path, shop)
    assert done.code == 130
    assert done.err.count(": stopped by Ctrl-C") == 1
    assert not any(words in done.err for words in ("Traceback", "frame #", ": error: ")), done.err
    assert done.seconds < 5 + SLACK


def test_logs_that_cannot_be_written(shop, tmp_path):
    """A full disk takes no more of rank 0's log, nor the metrics: one line each, and the run continues to its end."""
    for name in ("logs/rank-000.log", "run/metrics.jsonl"):
        (tmp_path / name).parent.mkdir()
        (tmp_path / name).symlink_to("/dev/full")
    words = finetune(shop, shop.dist, None, None, "--nproc_per_node", 1, iters=2)
    done = start(PLAIN, *words, "--log_dir", tmp_path / "logs", "--run_dir", tmp_path / "run", "--no_report")
    assert done.code == 0, done.err
    assert done.err.count("rank-000.log: no space left on device; nothing more is written to this log") == 1
    assert done.err.count("metrics.jsonl: no space left on device; nothing more is logged there") == 1


def test_one_rank_raises_before_any_collective(shop, tmp_path):
    """A file of one rank is damaged: one line, exit code 2, and no rank waits for the timeout of half an hour."""
    broken = copy(shop.split, tmp_path / "broken")
    cut(broken / "release" / "mp_rank_01_001" / "model_optim_rng.pt")
    (broken / "release" / "manifest.json").unlink(missing_ok=True)
    program = PLAIN
    began = time.time()
    done = start(program, *finetune(shop, broken, None, tmp_path / "run", *layout(2, 2), "--nproc_per_node", 4))
    assert done.code == 2, done.err
    assert len(said(done)) == 1 and "mp_rank_01_001/model_optim_rng.pt" in said(done)[0]
    assert done.ended - began < 60


def test_user_errors_are_printed_before_any_rank_is_started(shop, tmp_path):
    done = start(PLAIN, *finetune(shop, tmp_path / "nowhere"), "--nproc_per_node", 4, *layout(2, 2))
    assert (done.code, len(done.err.splitlines())) == (2, 1) and "nowhere: no such folder" in done.err


def test_time_limit_then_on_to_an_interval(shop, tmp_path):
    """At the limit the run saves and ends with 75. The next start runs to --exit_interval and ends with 0. Each rank has a log."""
    words = finetune(
        shop, shop.split, None, tmp_path / "run", *layout(2, 2), "--nproc_per_node", 4, "--auto_resume", iters=1000
    )
    done = start(PLAIN, *words, "--exit_duration_in_mins", 0.15)
    assert done.code == 75 and "stopped by its time limit at iteration" in done.err, done.err
    iteration = int((tmp_path / "run" / "latest_checkpointed_iteration.txt").read_text())
    done = start(PLAIN, *words, "--exit_interval", 2, "--log_dir", tmp_path / "logs")
    assert done.code == 0 and f"resuming at iteration {iteration}," in done.err, done.err
    stopped = (iteration // 2 + 1) * 2
    assert f"stopped by --exit_interval 2 at iteration {stopped} of 1000" in done.err
    logs = sorted(path.name for path in (tmp_path / "logs").iterdir())
    assert logs == [f"rank-00{n}.log" for n in range(4)]
    assert f"iteration {stopped:4d}/ 1000" in "".join(path.read_text() for path in (tmp_path / "logs").iterdir())


def test_the_end_of_a_slurm_job_is_a_time_limit(monkeypatch):
    from megatron_ft.config.sections import Stopping
    from megatron_ft.training.stopping import time_limit

    monkeypatch.delenv("SLURM_JOB_END_TIME", raising=False)
    assert time_limit(Stopping()) is None
    monkeypatch.setenv("SLURM_JOB_END_TIME", "2000000000")
    assert time_limit(Stopping()) == 2000000000 - 300
    assert time_limit(Stopping(exit_before_end_in_mins=0)) is None
    before, limit, after = time.time(), time_limit(Stopping(exit_duration_in_mins=1)), time.time()
    assert before + 60 <= limit <= after + 60


@pytest.mark.parametrize(
    "codes, asked, expected",
    [
        ([0, 0], False, 0), ([75, 75], True, 75), ([0, 75], False, 75), ([1, 1, 2], False, 2), ([-9, 1, 1], False, 1),
        ([-signal.SIGTERM] * 2, True, 75), ([-signal.SIGTERM, 0], False, 1), ([-signal.SIGTERM, 2], True, 2), ([130, 1], False, 130),
        ([75, -9, 75], True, 1), ([-signal.SIGTERM, -9], True, 1), ([-signal.SIGTERM, 1], True, 75),
    ],
)  # fmt: skip
def test_one_exit_code_for_all(codes, asked, expected):
    assert exit_code(codes, asked) == expected


def test_ranks_of_each_launcher(monkeypatch):
    for name in ("MASTER_ADDR", "MASTER_PORT", "SLURM_STEP_NUM_NODES", "SLURM_STEP_NUM_TASKS"):
        monkeypatch.delenv(name, raising=False)
    alone = places(Launching(nproc_per_node=4))
    assert (alone.world_size, alone.address, alone.port) == (4, "localhost", 0)
    with pytest.raises(ConfigError, match="--nnodes 4 needs --node_rank, a different one on every machine: 0 to 3"):
        places(Launching(nproc_per_node=8, nnodes=4))
    with pytest.raises(ConfigError, match="needs --master_addr and --master_port"):
        places(Launching(nproc_per_node=8, nnodes=4, node_rank=0))
    with pytest.raises(ConfigError, match="numbered from 0 to 3"):
        places(Launching(nproc_per_node=8, nnodes=4, node_rank=4, master_addr="a", master_port=1))
    for name, value in {
        "SLURM_PROCID": 2,
        "SLURM_STEP_NUM_NODES": 4,
        "SLURM_NODEID": 2,
        "MASTER_ADDR": "n0",
        "MASTER_PORT": 29500,
    }.items():
        monkeypatch.setenv(name, str(value))
    third = places(Launching(nproc_per_node=8)).environment(5)
    assert third["RANK"] == "21" and third["WORLD_SIZE"] == "32" and third["MASTER_ADDR"] == "n0"


def test_what_srun_started_are_ranks(monkeypatch):
    """One task per GPU under srun, without a launcher, is one run with several ranks. A batch script itself is no rank."""
    for name in ("RANK", "WORLD_SIZE", "LOCAL_RANK", "MASTER_ADDR", "MASTER_PORT"):
        monkeypatch.setenv(name, "x")  # to be put back
        monkeypatch.delenv(name)
    tasks = {"SLURM_PROCID": 5, "SLURM_LOCALID": 1, "SLURM_NTASKS": 8, "SLURM_JOB_ID": 31}
    for name, value in tasks.items():
        monkeypatch.setenv(name, str(value))
    join_srun(Launching())
    assert not is_rank()
    monkeypatch.setenv("SLURM_STEP_NUM_TASKS", "8")
    monkeypatch.setenv("SLURM_STEP_NUM_NODES", "2")
    join_srun(Launching(nproc_per_node=4))
    assert not is_rank()
    with pytest.raises(ConfigError, match="8 processes on 2 machines, and MASTER_ADDR is not set"):
        join_srun(Launching())
    monkeypatch.setenv("SLURM_STEP_NUM_NODES", "1")
    join_srun(Launching())
    names = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "MASTER_ADDR", "MASTER_PORT")
    assert [os.environ[name] for name in names] == ["5", "8", "1", "localhost", "20031"]


def test_a_stack_that_waits_for_others(tmp_path):
    code = tmp_path / "code.py"
    code.write_text("handle.wait()\nx = weigh(y)\n")
    line = 'Current thread 0x1 (most recent call first):\n  File "{}", line {} in f\n  File "a.py", line 2 in g\n'
    assert is_waiting(line.format(code, 1)) and is_waiting(line.format("x/torch/distributed/c10d.py", 5))
    assert not is_waiting(line.format(code, 2))


def test_rank_0_that_waits_for_the_others_to_connect_counts_as_waiting():
    """It opens torch's store in one C++ call. Seen when a run was stopped while its processes connected."""
    code = Path(parallel.__file__)
    number = next(n for n, line in enumerate(code.read_text().splitlines(), 1) if "dist.TCPStore(" in line)
    assert is_waiting(f'Current thread 0x1 (most recent call first):\n  File "{code}", line {number} in _held_store\n')


def test_main_thread_first(tmp_path):
    """Python writes the newest thread first and the main thread, which shows the cause, last."""
    one = '{} (most recent call first):\n  File "a.py", line 1 in f'
    stack = "\n\n".join((one.format("Thread 0x2"), one.format("Current thread 0x1")))
    first, second = oldest_first(stack).split("\n\n")
    assert first.startswith("Current thread 0x1") and second.startswith("Thread 0x2")
    assert oldest_first(oldest_first(stack)) == stack and oldest_first("") == ""


def test_no_other_program_can_take_the_port_of_the_ranks():
    """The launcher chooses the port before rank 0 has imported torch and listens. No other program can bind it meanwhile."""
    with meeting_place(places(Launching(nproc_per_node=2))) as (here, held):
        with socket.socket() as other, pytest.raises(OSError, match="in use"):
            other.bind(("", here.port))
        os.set_inheritable(held.fileno(), True)
        code = (
            "import sys, torch.distributed as dist\n"
            "port, held = map(int, sys.argv[1:])\n"
            "store = dist.TCPStore('localhost', port, 1, True, master_listen_fd=held)\n"
            "store.set('a', 'b'); print(store.get('a').decode())"
        )
        words = [sys.executable, "-c", code, str(here.port), str(held.fileno())]
        done = subprocess.run(words, close_fds=False, capture_output=True, text=True, timeout=120)
    assert done.stdout == "b\n", done.stderr
    with meeting_place(replace(here, port=4711)) as (named, held):
        assert (named.port, held) == (4711, None)


def test_a_port_that_another_program_has(shop, tmp_path):
    """One line that names it, and exit code 2."""
    with socket.create_server(("", 0)) as taken:
        port = taken.getsockname()[1]
        words = finetune(shop, shop.dist, None, None, "--nproc_per_node", 2, "--master_port", port, iters=2)
        done = start(PLAIN, *words)
    assert done.code == 2 and len(said(done)) == 1, done.err
    assert f"port {port} of {socket.gethostname()}" in done.err and "--master_port" in done.err
