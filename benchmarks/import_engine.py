"""Imports the engine with and without the garbage collector at work, and forks ranks from both: seconds, and memory of the ranks' own.

    python benchmarks/import_engine.py [--pairs 5] [--ranks 4]

`prepare_engine` turns the collector off during its imports and keeps what they made out of it afterwards. The alternative is the same
function without that. Each of the forked ranks then collects garbage once, as any training run does many times. Processor seconds are
those of the import. Memory is what each rank does not share with the others (Private_Dirty of /proc/PID/smaps_rollup), in MiB.
"""

from __future__ import annotations

import argparse
import json
import statistics
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent

PROGRAM = """
import contextlib, gc, json, os, sys, time
from pathlib import Path
from megatron_ft.engine import start
if sys.argv[1] == "with":
    start.no_collection = contextlib.nullcontext
before = time.process_time()
start.prepare_engine()
seconds = time.process_time() - before
if sys.argv[1] == "without":
    gc.freeze()
own = []
for _ in range(int(sys.argv[2])):
    here, there = os.pipe()
    if not os.fork():
        gc.collect()
        lines = Path("/proc/self/smaps_rollup").read_text().splitlines()
        kib = next(int(line.split()[1]) for line in lines if line.startswith("Private_Dirty"))
        os.write(there, str(kib).encode())
        os._exit(0)
    os.close(there)
    own.append(int(os.read(here, 100)) / 1024)
    os.wait()
print(json.dumps([seconds, max(own)]))
"""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--pairs", type=int, default=5)
    parser.add_argument("--ranks", type=int, default=4)
    arguments = parser.parse_args()
    found = {"with": [], "without": []}
    for pair in range(arguments.pairs):
        for way in ("with", "without") if pair % 2 else ("without", "with"):
            found[way].append(_measure(way, arguments.ranks))
    for number, what in enumerate(("processor seconds of the import", "MiB of a rank's own after one collection")):
        plain, ours = (statistics.median(run[number] for run in found[way]) for way in ("with", "without"))
        print(f"{what}: {plain:.2f} with the collector, {ours:.2f} without; ratio {ours / plain:.2f}")


def _measure(way: str, ranks: int) -> list[float]:
    done = subprocess.run([sys.executable, "-c", PROGRAM, way, str(ranks)], cwd=ROOT, capture_output=True, text=True)
    if done.returncode:
        sys.exit(done.stderr)
    return json.loads(done.stdout.splitlines()[-1])


if __name__ == "__main__":
    main()
