"""Asks jobs to stop, with SIGTERM or SIGUSR1 at random moments of loading, stepping, evaluating and saving: each leaves a checkpoint that
loads, at most one step behind, and the exit code on which a launch script starts it again.

    python benchmarks/stop_jobs.py [--stops 300] [--ranks 2] [--seconds 1e9]

Before the processes have found each other a run does not listen yet: the signal ends it, and nothing was new. The signal goes to one
rank or to all. One time in five the grace is too short: SIGKILL follows after some milliseconds, and the earlier
checkpoint has to be intact. The next job goes on where the last one stopped; saves are in the background half of the time.
"""

from __future__ import annotations

import argparse
import random
import signal
import sys
import time
from collections import Counter
from pathlib import Path
from tempfile import TemporaryDirectory

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from benchmarks import forked_jobs
from megatron_ft.training.stopping import EXIT_REQUEUE

SLOWEST = 60.0
"""Seconds after which a job that was asked to stop counts as hanging."""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    for name, default in {"stops": 300, "ranks": 2, "seed": 0}.items():
        parser.add_argument(f"--{name}", type=int, default=default)
    parser.add_argument("--seconds", type=float, default=1e9, help="stop after so many")
    arguments = vars(parser.parse_args())
    with TemporaryDirectory() as folder:
        forked_jobs.prepare(Path(folder))
        found, wrong = campaign(Path(folder), **arguments)
    say(found)
    print("\n".join(wrong))
    sys.exit(bool(wrong))


def campaign(folder: Path, stops: int, ranks: int, seed: int = 0, seconds: float = 1e9) -> tuple[Counter, list[str]]:
    """(what became of the stops, what was wrong). folder: as forked_jobs.prepare made it."""
    rng, found, wrong, until = random.Random(seed), Counter(), [], time.monotonic() + seconds
    found["stops"] = 0
    last = 0
    while found["stops"] < stops and time.monotonic() < until:
        job = forked_jobs.Job(
            folder, ranks, ranks, 1, load=str(folder / "checkpoint"), data_path=[str(folder / "chats-train")],
            save=str(folder / "run"), train_iters=10**6, save_interval=3, eval_interval=4, keep_last=2, auto_resume=True,
            async_save=rng.random() < 0.5,
        )  # fmt: skip
        _wait_for(job, rng.choice(forked_jobs.PHASES[1:5]))
        time.sleep(rng.random() * 0.02)
        phase, number = job.phase, rng.choice([signal.SIGTERM, signal.SIGUSR1])
        too_short = rng.random() < 0.2
        reached, asked = job.steps, time.monotonic()
        listens = phase != "loading"  # one rank ended by the signal alone would leave the others waiting for it to join
        job.send(number, rng.choice([None, rng.randrange(ranks)]) if listens else None)
        if too_short:
            time.sleep(rng.random() * 0.05)
            job.send(signal.SIGKILL)
        while job.running() and time.monotonic() < asked + SLOWEST:
            time.sleep(0.005)
        if job.running():
            wrong.append(f"stop {found['stops']} while {phase}: hangs")
            job.send(signal.SIGKILL)
        codes = job.wait()
        done = max(job.steps, reached)
        found["stops"] += 1
        found[f"while {phase}"] += 1
        found["with too short a grace"] += too_short
        saved, passed = forked_jobs.newest(folder / "run")
        if too_short:
            lost = last - saved  # what an earlier job had left has to be there still
        else:
            found["slowest, ms"] = max(found["slowest, ms"], round(1000 * (time.monotonic() - asked)))
            lost = done - saved
            found["steps lost"] += max(0, lost)
            if -number in codes and phase == "loading":
                found["ended by the signal, before the run listened"] += 1
            elif codes != [EXIT_REQUEUE] * ranks:
                wrong.append(f"stop {found['stops']} while {phase}: exit codes {codes}")
        if passed or saved < 0 or lost > (0 if too_short else 1):
            wrong.append(
                f"stop {found['stops']} while {phase}: {done} steps done, newest {saved}, {passed} passed over"
            )
        last = max(last, saved)
        if found["stops"] % 50 == 0:
            say(found)
    return found, wrong


def _wait_for(job: forked_jobs.Job, phase: str) -> None:
    """Until the job is doing that, or has done it so quickly that it was not seen."""
    until = time.monotonic() + 5
    while job.phase != phase and job.running() and time.monotonic() < until:
        time.sleep(0.0005)


def say(found: Counter) -> None:
    print(", ".join(f"{what}: {count:,}" for what, count in found.items()), flush=True)


if __name__ == "__main__":
    main()
