"""Starts short trainings by a plain `srun -N2 --ntasks-per-node=2`, without our launcher, on a busy machine: does each end?

    python benchmarks/plain_srun.py [--runs 200] [--load 8] [--apart] [--seconds 1e9]      under a real SLURM

--load: so many processes do nothing but compute meanwhile. One that has not ended after --patience seconds is a hang: every one of its
processes is then made to show where it is (SIGABRT, Python's fault handler), and the output is kept. Needs what slurm_cluster.py needs.
"""

from __future__ import annotations

import argparse
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from tempfile import TemporaryDirectory

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from benchmarks import forked_jobs
from benchmarks.first_errors import busy
from benchmarks.slurm_cluster import Cluster

ROOT = Path(__file__).resolve().parent.parent
PORT = 21000


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    for name, default in {"runs": 200, "load": 8, "patience": 180}.items():
        parser.add_argument(f"--{name}", type=int, default=default)
    parser.add_argument("--apart", action="store_true", help="nodes with a network of their own; as root")
    parser.add_argument("--seconds", type=float, default=1e9, help="begin nothing new after so many")
    given = parser.parse_args()
    until, taken, wrong = time.monotonic() + given.seconds, [], []
    with TemporaryDirectory() as name:
        folder = Path(name)
        forked_jobs.prepare(folder)
        shape = {"nodes": 2, "cpus": 4, "apart": given.apart} | ({"share": (ROOT, folder)} if given.apart else {})
        with Cluster(folder / "cluster", **shape) as cluster, busy(given.load):
            while len(taken) < given.runs and time.monotonic() < until:
                began = time.monotonic()
                fault = one(cluster, folder, given.patience, len(taken))
                taken.append(time.monotonic() - began)
                if fault:
                    wrong.append(f"run {len(taken)}: {fault}")
                    print(wrong[-1], flush=True)
                if len(taken) % 10 == 0:
                    print(f"{len(taken)} runs, {len(wrong)} wrong, load {os.getloadavg()[0]:.1f}", flush=True)
    print(
        f"{len(taken)} runs, {len(wrong)} wrong; {sorted(taken)[len(taken) // 2]:.1f} s (median), {max(taken):.1f} s at most; "
        f"load {os.getloadavg()[0]:.1f} at the end"
    )
    sys.exit(bool(wrong))


def one(cluster: Cluster, folder: Path, patience: float, number: int) -> str | None:
    """What was wrong with one run."""
    words = ["srun", "-N2", "--ntasks-per-node=2", sys.executable, "-m", "megatron_ft", "finetune"]
    words += [
        "--load",
        folder / "checkpoint",
        "--data_path",
        folder / "chats-train",
        "--train_iters",
        2,
        "--seq_length",
        64,
    ]
    words += [
        "--tensor_model_parallel_size",
        2,
        "--pipeline_model_parallel_size",
        2,
        "--no_report",
        "--log_interval",
        1,
    ]
    environment = {
        **os.environ, "MEGATRON_FT_DEVICE": "cpu", "OMP_NUM_THREADS": "1", "PYTHONFAULTHANDLER": "1",
        "MASTER_ADDR": cluster.nodes[0], "MASTER_PORT": str(PORT + number % 10000),
    }  # fmt: skip
    out = folder / "out"
    with out.open("w") as file:
        try:
            done = cluster.run(
                *words, seconds=patience, cwd=ROOT, env=environment, capture_output=False, stdout=file, stderr=file
            )
        except subprocess.TimeoutExpired:
            subprocess.run(["pkill", f"-{signal.SIGABRT.value}", "-f", str(folder / "chats-train")], timeout=30)
            time.sleep(5)
            cluster.run("scancel", "--user", str(os.geteuid()))
            return f"hangs after {patience} s:\n{out.read_text()[-20000:]}"
    said = out.read_text()
    if done.returncode or "iteration 2/ 2 |" not in said:
        return f"exit code {done.returncode}:\n{said[-5000:]}"
    return None


if __name__ == "__main__":
    main()
