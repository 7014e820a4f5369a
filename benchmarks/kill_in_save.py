"""Kills a run with SIGKILL in the middle of its saves, thousands of times: afterwards the last checkpoint that counted loads, to the bit.

    python benchmarks/kill_in_save.py [--kills 10000] [--seed 0] [--seconds 1e9]

The run saves small tensors through the real protocol (see small_saves.py), alternately here and by a background process, and is killed
at a random moment; then the folder is read as a run that resumes reads it. Wrong is: nothing loads; the checkpoint that the tracker names
does not; or one that had been reported as committed is not there. The next run goes on in the same folder, with what the killed one left.
"""

from __future__ import annotations

import argparse
import gc
import mmap
import os
import random
import signal
import sys
import time
from collections import Counter
from pathlib import Path
from tempfile import TemporaryDirectory

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from benchmarks import small_saves
from megatron_ft.checkpoints.folder import TRACKER

LONGEST = 0.04
"""Seconds a run lives at most after its first save began: a few saves."""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--kills", type=int, default=10_000)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--seconds", type=float, default=1e9, help="stop after so many")
    arguments = parser.parse_args()
    with TemporaryDirectory() as folder:
        found = campaign(Path(folder), arguments.kills, arguments.seed, arguments.seconds)
    say(found)
    sys.exit(bool(found["unloadable"] + found["tracked one unloadable"] + found["committed one lost"]))


def campaign(root: Path, kills: int, seed: int = 0, seconds: float = 1e9) -> Counter:
    """What became of the kills. root: where all of them save."""
    rng, found, until = random.Random(seed), Counter(), time.monotonic() + seconds
    for what in ("kills", "kills inside a save", "unloadable", "tracked one unloadable", "committed one lost", "saves"):
        found[what] = 0
    shared = mmap.mmap(-1, 16)  # [0:8] the last iteration that was committed, [8] whether a save is under way
    last = 0
    gc.freeze()
    while found["kills"] < kills and time.monotonic() < until:
        shared[:9] = last.to_bytes(8, "little") + b"\0"
        inside = _one_kill(root, rng, shared, last, asynchronous=found["kills"] % 2 == 1)
        committed = int.from_bytes(shared[:8], "little")
        found["kills"] += 1
        found["kills inside a save"] += inside
        found["saves"] += committed - last
        loaded, passed = small_saves.newest(root) if (root / TRACKER).exists() else (0, 0)
        found["unloadable"] += loaded < 0
        found["tracked one unloadable"] += passed > 0
        found["committed one lost"] += loaded < committed
        last = max(loaded, committed)
        if found["kills"] % 500 == 0:
            say(found)
    return found


def say(found: Counter) -> None:
    print(", ".join(f"{what}: {count:,}" for what, count in found.items()), flush=True)


def _one_kill(root: Path, rng: random.Random, shared: mmap.mmap, last: int, asynchronous: bool) -> bool:
    """Fork a run that goes on after `last`, kill it; whether a save was under way."""
    child = os.fork()
    if not child:
        _save(root, shared, last, asynchronous)
    deadline = time.monotonic() + 60
    while not shared[8] and time.monotonic() < deadline:
        time.sleep(0.0005)
    time.sleep(rng.random() * LONGEST)
    inside = bool(shared[8])
    os.kill(child, signal.SIGKILL)
    os.waitpid(child, 0)
    return inside


def _save(root: Path, shared: mmap.mmap, last: int, asynchronous: bool) -> None:
    os.setpgid(0, 0)
    try:
        small_saves.join()
        for committed in small_saves.save_on(
            root, small_saves.layout(), asynchronous, keep=2, first=last + 1, under_way=lambda: shared.__setitem__(8, 1)
        ):
            shared[:8] = committed.to_bytes(8, "little")
    except BaseException:
        import traceback

        traceback.print_exc()
    os._exit(1)


if __name__ == "__main__":
    main()
