"""Kills whole jobs with SIGKILL at random moments and starts them again: in the end every weight, every moment of the optimizer and
every random stream is, to the bit, that of the run which nobody disturbed.

    python benchmarks/kill_jobs.py [--runs 1] [--kills 20] [--ranks 2] [--tp 2] [--pp 1] [--steps 60] [--seconds 1e9]

A run has so many steps with a checkpoint after each fifth. It is killed so many times, all its ranks at once or only one of them (the
others then end by themselves), and goes on with --auto_resume each time; then it may finish.
"""

from __future__ import annotations

import argparse
import random
import shutil
import signal
import sys
import time
from collections import Counter
from pathlib import Path
from tempfile import TemporaryDirectory

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from benchmarks import forked_jobs
from megatron_ft.checkpoints.verify import tensor_hashes


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    for name, default in {"runs": 1, "kills": 20, "ranks": 2, "tp": 2, "pp": 1, "steps": 60, "seed": 0}.items():
        parser.add_argument(f"--{name}", type=int, default=default)
    parser.add_argument("--async_save", action="store_true")
    parser.add_argument("--seconds", type=float, default=1e9, help="begin no further run after so many")
    arguments = vars(parser.parse_args())
    with TemporaryDirectory() as folder:
        forked_jobs.prepare(Path(folder))
        found = campaign(Path(folder), **arguments)
    print(", ".join(f"{what}: {count:,}" for what, count in found.items()))
    sys.exit(found["equal to the undisturbed run"] != found["runs"])


def campaign(
    folder: Path, runs: int, kills: int, ranks: int, tp: int, pp: int, steps: int, seed: int = 0,
    async_save: bool = False, seconds: float = 1e9,
) -> Counter:  # fmt: skip
    """folder: as forked_jobs.prepare made it."""
    rng, found, until = random.Random(seed), Counter(), time.monotonic() + seconds

    def start(save: Path) -> forked_jobs.Job:
        return forked_jobs.Job(
            folder, ranks, tp, pp, load=str(folder / "checkpoint"), data_path=[str(folder / "chats-train")], save=str(save),
            train_iters=steps, save_interval=5, keep_last=2, auto_resume=True, use_distributed_optimizer=True,
            async_save=async_save,
        )  # fmt: skip

    began = time.monotonic()
    straight = start(folder / "straight")
    assert straight.wait() == [0] * ranks
    whole = time.monotonic() - began
    wanted = tensor_hashes(folder / "straight" / f"iter_{steps:07d}")
    for what in ("runs", "kills", "starts", "steps lost", "equal to the undisturbed run"):
        found[what] = 0
    while found["runs"] < runs and time.monotonic() < until:
        save = folder / "run"
        shutil.rmtree(save, ignore_errors=True)
        left = kills
        while True:
            job = start(save)
            found["starts"] += 1
            if not left:
                break
            time.sleep(rng.random() * whole * 0.6)
            alone = rng.random() < 0.3
            if job.running():
                found[f"in {job.phase}"] += 1
                found["kills"] += 1
                left -= 1
            reached = job.steps
            job.send(signal.SIGKILL, rng.randrange(ranks) if alone else None)
            if alone:  # a rank that still waits for the dead one to join is ended by the launcher; here, by us
                time.sleep(2)
                job.send(signal.SIGKILL)
            job.wait()
            saved = forked_jobs.newest(save)[0]
            found["steps lost"] += max(0, reached - saved)
            if saved == steps:  # it finished before it was killed often enough: from the beginning, the kills go on
                shutil.rmtree(save)
        codes = job.wait()
        found["runs"] += 1
        equal = codes == [0] * ranks and tensor_hashes(save / f"iter_{steps:07d}") == wanted
        found["equal to the undisturbed run"] += equal
        print(", ".join(f"{what}: {count:,}" for what, count in found.items()), flush=True)
    return found


if __name__ == "__main__":
    main()
