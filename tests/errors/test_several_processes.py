"""Mistakes met by processes that torchrun started: our line comes first, comes once, and is the root cause in torchrun's report."""

import os
import re
import subprocess
import sys

import pytest

from tests.errors.conftest import ROOT, copy, cut, finetune
from tests.errors.test_before_torch import layout

pytestmark = pytest.mark.slow


def torchrun(processes: int, *words, timeout: float = 120.0) -> list[str]:
    """The lines on stderr of a failing run."""
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "MEGATRON_FT_DEVICE": "cpu"}
    launcher = ["-m", "torch.distributed.run", "--standalone", "--nproc_per_node", processes, "-m", "megatron_ft"]
    done = subprocess.run(
        [sys.executable, *map(str, launcher), *map(str, words)],
        cwd=ROOT, env=environment, capture_output=True, text=True, timeout=timeout,
    )  # fmt: skip
    assert done.returncode == 1 and not done.stdout
    return done.stderr.splitlines()


def assert_said_once(lines: list[str], message: str) -> None:
    """Before torchrun's report and, quoted, as the root cause in it. No traceback but torchrun's own."""
    said = [i for i, line in enumerate(lines) if line.startswith("megatron-ft ")]
    tracebacks = [i for i, line in enumerate(lines) if line.startswith("Traceback")]
    assert len(said) == len(tracebacks) == 1 and said < tracebacks, lines
    line = lines[said[0]]
    assert re.search(message, line)
    root_cause = lines[lines.index("Root Cause (first observed failure):") :]
    assert f"  traceback : {line}" in root_cause, lines


def test_what_every_process_meets(shop, tmp_path):
    lines = torchrun(2, *finetune(shop, tmp_path / "nowhere"), *layout(2, 1))
    assert_said_once(lines, "nowhere: no such folder")


@pytest.mark.thorough
def test_number_of_processes(shop):
    lines = torchrun(2, *finetune(shop), *layout(2, 2))
    assert_said_once(lines, "2 process.* = 4: start a multiple of 4: --nproc_per_node 4")


def test_what_one_process_meets(shop, tmp_path):
    """The others' connections break; that is no message."""
    broken = copy(shop.split, tmp_path / "broken")
    cut(broken / "release" / "mp_rank_01_001" / "model_optim_rng.pt")
    lines = torchrun(4, *finetune(shop, broken, None, tmp_path / "run"), *layout(2, 2))
    assert_said_once(lines, r"mp_rank_01_001/model_optim_rng.pt has .*cut short")
    assert not (tmp_path / "run").exists()
