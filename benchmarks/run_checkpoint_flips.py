"""Flips thousands of random bits of a run's checkpoint and counts which of them a run that resumes would take without a word.

    python benchmarks/run_checkpoint_flips.py [--flips 40000]

One bit at a time, in every file of a checkpoint in torch_dist (small tensors, see small_saves.py) and in a classic one; then the
checkpoint is chosen and verified as finetune does it. To reach: every flip refused by the file's name.
"""

from __future__ import annotations

import sys
from collections.abc import Callable
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from benchmarks import small_saves
from benchmarks.bit_flips import Flips, command, flip_bits
from megatron_ft.checkpoints.folder import CheckpointConfig, describe, rank_file, write_config
from megatron_ft.checkpoints.select import candidates, first_whole
from megatron_ft.checkpoints.verify import read_description
from megatron_ft.checkpoints.writer import save_tensors
from megatron_ft.config.sections import Checkpointing
from megatron_ft.digests import check_digests, write_digests


def campaign(folder: Path, flips: int, seed: int = 0, seconds: float = 1e9) -> Flips:
    """Half of the flips for each format; of these half hit every file as often, half hit files by their size."""
    if not small_saves.torch.distributed.is_initialized():
        small_saves.join()
    small_saves.save_some(folder / "sharded", small_saves.layout(), False, None, first=5, saves=1)
    sharded, classic = folder / "sharded" / "iter_0000005", _classic(folder / "classic")
    total = Flips()
    for part, where in enumerate((sharded, sharded, classic, classic)):
        files = sorted(path for path in where.rglob("*") if path.is_file())
        total += flip_bits(files, _reader(where), flips // 4, seed + part, by_size=part % 2 == 1, seconds=seconds / 4)
    return total


def _reader(folder: Path) -> Callable[[], None]:
    """Chosen and verified as a run does it, by one rank."""

    def read() -> None:
        _, config = first_whole(candidates(folder), describe, Checkpointing(load=str(folder)))
        check_digests(folder)
        if config.ckpt_format == "torch_dist":
            read_description(folder)

    return read


def _classic(folder: Path) -> Path:
    config = CheckpointConfig(small_saves.ARCHITECTURE, "torch", 1, 1, 128, 5, "fp32", digested=True)
    path = rank_file(folder, 0, 0, 1, 1)
    path.parent.mkdir(parents=True)
    save_tensors({"model": small_saves.tensors(5), "progress": {"iteration": 5}}, path)
    write_config(folder, config)
    write_digests(folder)
    return folder


if __name__ == "__main__":
    command(__doc__, 40_000, campaign)
