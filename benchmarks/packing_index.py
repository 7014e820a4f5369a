"""Claim: the rows of a million samples are planned within two seconds, and the next process maps that plan.

    python benchmarks/packing_index.py [--samples 1000000] [--seq_length 4096]

Shards with lengths as chats have them are written first (not measured). Then processes one after another, each from its start: open
the shards, plan the first epoch's rows, read the first row. The first builds and keeps the plan, the others map it.
"""

import argparse
import json
import subprocess
import sys
import time
from pathlib import Path
from tempfile import TemporaryDirectory

import numpy as np

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--samples", type=int, default=1_000_000)
    parser.add_argument("--seq_length", type=int, default=4096)
    parser.add_argument("--one", help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.one:
        print(json.dumps(one(arguments.one, arguments.seq_length)))
        return
    with TemporaryDirectory() as folder:
        write(Path(folder) / "x", arguments.samples)
        for name in ("plans", "maps", "maps"):
            command = [sys.executable, __file__, "--one", f"{folder}/x", "--seq_length", str(arguments.seq_length)]
            found = json.loads(subprocess.run(command, check=True, capture_output=True, text=True).stdout)
            print(
                f"{name}: shards open in {found['open']:.2f} s, first epoch ready {found['ready']:.2f} s later "
                f"({'mapped' if found['mapped'] else 'in memory'}): {arguments.samples:,} samples in {found['rows']:,} rows of "
                f"{arguments.seq_length}, {found['fill']:.2%} filled"
            )


def write(prefix: Path, samples: int) -> None:
    from megatron_ft.data.shards import ShardWriter

    rng = np.random.default_rng(0)
    with ShardWriter(prefix, 32000) as writer:
        for _ in range(0, samples, 10_000):
            lengths = np.clip(rng.lognormal(5.8, 0.9, min(10_000, samples)).astype(int), 20, 8000)
            ids = rng.integers(0, 32000, lengths.sum()).astype(np.uint16)
            writer.add_many(ids, np.full(len(ids), 2, np.uint8), lengths)


def one(prefix: str, seq_length: int) -> dict:
    from megatron_ft.data.loader import ChatDataset, Choices
    from megatron_ft.data.roles import loss_weights
    from megatron_ft.data.shards import open_shards

    started = time.monotonic()
    shards = open_shards(prefix)
    opened = time.monotonic()
    dataset = ChatDataset([shards], loss_weights(), Choices(seq_length, cache=str(Path(prefix).parent / "plans")))
    rows = dataset.epoch_rows(0)
    dataset.microbatch([0])
    ready = time.monotonic()
    mapped = isinstance(rows.order, np.memmap)
    return {
        "open": opened - started,
        "ready": ready - opened,
        "rows": len(rows),
        "fill": dataset.fill(),
        "mapped": mapped,
    }


if __name__ == "__main__":
    main()
