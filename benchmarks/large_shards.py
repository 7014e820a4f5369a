"""Claim: shards larger than 4 GiB are written, opened and read right to the last token, by us and by megatron-core.

    python benchmarks/large_shards.py [--gib 4.3] [--folder /big/disk]

Samples whose tokens follow from their number are written until the .bin file of the tokens has so many GiB (the roles take half of
that again). Then the whole is verified against its hashes, and samples on both sides of every GiB and the last ones are read back.
"""

import argparse
import time
from pathlib import Path
from tempfile import TemporaryDirectory

import numpy as np

from megatron_ft.data.shards import ShardWriter, open_shards

VOCABULARY, A_BLOCK = 32_000, 1000  # samples written at once


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--gib", type=float, default=4.3)
    parser.add_argument("--folder", type=Path, default=None)
    arguments = parser.parse_args()
    with TemporaryDirectory(dir=arguments.folder) as folder:
        prefix = Path(folder) / "large"
        started = time.monotonic()
        samples = write(prefix, int(arguments.gib * 2**30))
        size = Path(f"{prefix}-text.bin").stat().st_size
        print(f"{samples:,} samples, {size / 2**30:.2f} GiB of tokens written in {time.monotonic() - started:.0f} s")
        started = time.monotonic()
        shards = open_shards(prefix, verify=True)
        print(f"opened and compared with their hashes in {time.monotonic() - started:.1f} s")
        ends = np.cumsum(shards.lengths, dtype=np.int64) * 2
        places = [
            np.searchsorted(ends, gib * 2**30) + step for gib in range(1, int(arguments.gib) + 1) for step in (-1, 0, 1)
        ]
        chosen = sorted({0, 1, *map(int, places), len(shards) - 2, len(shards) - 1})
        read_by_us = [shards.tokens(i) for i in chosen]
        read_by_engine = engine(str(prefix), chosen)
        for i, ours, theirs in zip(chosen, read_by_us, read_by_engine, strict=True):
            assert np.array_equal(ours, tokens(i)) and np.array_equal(theirs, tokens(i)), i
        print(
            f"{len(chosen)} samples around every GiB and at the end, up to byte {ends[-1]:,}: right for us and megatron-core"
        )


def tokens(sample: int) -> np.ndarray:
    """A sample's tokens: 300 to 1299 of them."""
    return ((np.arange(300 + sample % 1000) * 31 + sample) % VOCABULARY).astype(np.uint16)


def write(prefix: Path, size: int) -> int:
    count = written = 0
    with ShardWriter(prefix, VOCABULARY) as writer:
        writer.source("numbers", "none", "xxh3:0")
        while written < size:
            block = [tokens(i) for i in range(count, count + A_BLOCK)]
            ids = np.concatenate(block)
            writer.add_many(ids, (ids % 4).astype(np.uint8), np.array([len(one) for one in block]))
            count, written = count + A_BLOCK, written + ids.nbytes
    return count


def engine(prefix: str, chosen: list[int]) -> list[np.ndarray]:
    from megatron.core.datasets.indexed_dataset import IndexedDataset

    dataset = IndexedDataset(f"{prefix}-text")
    assert len(dataset) == chosen[-1] + 1
    return [np.array(dataset[i]) for i in chosen]


if __name__ == "__main__":
    main()
