"""Flips thousands of random bits of a shard set and counts which of them training would take without a word.

    python benchmarks/shard_flips.py [--flips 30000]

One bit at a time, in the .bin and .idx files and the manifests of a training and a validation split; then the shards are opened
as finetune opens them (its checks before anything waits). To reach: every flip refused by the file's name.
"""

from __future__ import annotations

import sys
from pathlib import Path

import numpy as np

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from benchmarks.bit_flips import Flips, command, flip_bits
from megatron_ft.checkpoints.folder import CheckpointConfig
from megatron_ft.config.sections import Data
from megatron_ft.data.shards import ShardWriter
from megatron_ft.models.architecture import Architecture
from megatron_ft.training.datasets import make_datasets


def campaign(folder: Path, flips: int, seed: int = 0, seconds: float = 1e9) -> Flips:
    """Half of the flips hit every file as often, half hit files by their size."""
    architecture = Architecture(
        family="llama", num_layers=1, hidden_size=8, ffn_hidden_size=8, num_attention_heads=1, num_query_groups=1,
        head_dim=8, vocab_size=32007, max_position_embeddings=256, norm_epsilon=1e-5,
    )  # fmt: skip
    checkpoint = CheckpointConfig(architecture, "torch_dist", 1, 1, 32128, "release", "fp32")
    for split in ("train", "val"):
        write(folder / f"x-{split}", np.random.default_rng([seed, len(split)]))
    files = sorted(folder.iterdir())

    def read() -> None:
        make_datasets(Data([str(folder / "x-train")], seq_length=128), checkpoint)

    evenly = flip_bits(files, read, flips // 2, seed, seconds=seconds / 2)
    return evenly + flip_bits(files, read, flips - flips // 2, seed + 1, by_size=True, seconds=seconds / 2)


def write(prefix: Path, rng: np.random.Generator) -> None:
    """Shards with two sources, marks and weights."""
    with ShardWriter(prefix, 32007, weights=[1.0, 0.5]) as writer:
        for source in ("one", "two"):
            writer.source(source, f"{source}.jsonl", "xxh3:0")
            for length in rng.integers(2, 100, 40):
                roles = np.sort(rng.integers(0, 4, length)) | rng.choice([0, 0b1000, 0b10000], length)
                writer.add(rng.integers(0, 32007, length), roles)


if __name__ == "__main__":
    command(__doc__, 30_000, campaign)
