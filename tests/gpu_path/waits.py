"""Print how often the host waits for the device in one optimizer step, by file and line.

    python -m tests.gpu_path.waits [SCENARIO...]      # of tests/gpu_path/scenarios.py; default: bf16-full

4 layers, 8 microbatches, all ranks of the scenario; the second of two steps. A wait at a line of the engine is followed by who called it.
"""

from __future__ import annotations

import sys

from tests.gpu_path.nursery import GpuRanks, Nursery
from tests.gpu_path.scenarios import SCENARIOS


def main(names: list[str]) -> int:
    """Print a table for each rank of each scenario."""
    unknown = [name for name in names if name not in SCENARIOS]
    if unknown:
        print(f"no scenario {', '.join(unknown)}; there are {', '.join(SCENARIOS)}", file=sys.stderr)
        return 2
    from tests.gpu_path.steps import walk

    nursery = Nursery()
    for name in names or ["bf16-full"]:
        ranks = GpuRanks(nursery, SCENARIOS[name].processes)
        for number, rank in enumerate(ranks.run(walk, SCENARIOS[name])):
            print(f"{name}, rank {number}: {rank.counts.table()}\n")
        ranks.close()
    nursery.close()
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
