"""Kills or stops one rank of a running job at a random moment: how long until all processes are gone, and what the first line says.

    python benchmarks/lost_ranks.py [--kills 10] [--stops 5] [--ranks 4] [--seconds 1e9]

The ranks are started by `finetune --nproc_per_node`. A stopped rank is noticed when the others' patience ends, here 9 seconds: what is
counted for it is the time beyond that.
"""

from __future__ import annotations

import argparse
import os
import random
import signal
import subprocess
import sys
import time
from pathlib import Path
from tempfile import TemporaryDirectory

import psutil

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

from benchmarks import forked_jobs  # noqa: E402

PATIENCE = 9.0
"""Seconds of --distributed_timeout_minutes."""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    for name, default in {"kills": 10, "stops": 5, "ranks": 4, "seed": 0}.items():
        parser.add_argument(f"--{name}", type=int, default=default)
    parser.add_argument("--seconds", type=float, default=1e9, help="begin nothing new after so many")
    given = parser.parse_args()
    rng, until, wrong = random.Random(given.seed), time.monotonic() + given.seconds, 0
    with TemporaryDirectory() as name:
        folder = Path(name)
        forked_jobs.prepare(folder)
        for number, runs in ((signal.SIGKILL, given.kills), (signal.SIGSTOP, given.stops)):
            taken = []
            while len(taken) < runs and time.monotonic() < until:
                seconds, fault = lose_one(folder, given.ranks, number, rng)
                taken.append(seconds - (PATIENCE if number == signal.SIGSTOP else 0))
                if fault:
                    wrong += 1
                    print(fault)
            if taken:
                beyond = " beyond the patience" if number == signal.SIGSTOP else ""
                middle = sorted(taken)[len(taken) // 2]
                print(
                    f"{signal.Signals(number).name}: {len(taken)} times one of {given.ranks} ranks; all gone after {middle:.1f} s{beyond} "
                    f"(median), {max(taken):.1f} s at most"
                )
    print(f"{wrong} wrong")
    sys.exit(bool(wrong))


def lose_one(folder: Path, ranks: int, number: int, rng: random.Random) -> tuple[float, str | None]:
    """(seconds until the launcher and all ranks were gone, what was wrong with exit code or first line)."""
    words = [
        "finetune",
        "--load",
        folder / "checkpoint",
        "--data_path",
        folder / "chats-train",
        "--train_iters",
        1000000,
    ]
    words += [
        "--seq_length",
        64,
        "--log_interval",
        1,
        "--nproc_per_node",
        ranks,
        "--distributed_timeout_minutes",
        PATIENCE / 60,
    ]
    with (folder / "out").open("w") as out, (folder / "err").open("w") as err:
        job = subprocess.Popen(
            [sys.executable, "-m", "megatron_ft", *map(str, words)], cwd=ROOT, stdout=out, stderr=err,
            env={**os.environ, "MEGATRON_FT_DEVICE": "cpu", "OMP_NUM_THREADS": "1"},
        )  # fmt: skip
        while "iteration" not in (folder / "out").read_text() and job.poll() is None:
            time.sleep(0.05)
        time.sleep(rng.random())
        processes = psutil.Process(job.pid).children()
        victim = rng.choice(processes)
        began = time.monotonic()
        victim.send_signal(number)
        code = job.wait(120)
        psutil.wait_procs(processes, 30)
        seconds = time.monotonic() - began
    said = [line for line in (folder / "err").read_text().splitlines() if "error:" in line]
    right = code == 1 and said and f"(process {victim.pid} on " in said[0]
    return seconds, None if right else f"exit code {code}, first line {said[:1]}"


if __name__ == "__main__":
    main()
