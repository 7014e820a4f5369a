"""Flips random bits of exports and converted checkpoints and counts which of them our commands would take without a word.

    python benchmarks/checkpoint_flips.py [--flips 30000]

One bit at a time, in every file of a torch checkpoint, a torch_dist checkpoint and an export; then the folder is opened as
megatron-to-hf, reshard, verify and hf-to-megatron open it. To reach: every flip refused by the file's name.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path
from tempfile import TemporaryDirectory

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from benchmarks.bit_flips import Flips, flip_bits
from benchmarks.hostile_files import make_sound
from checkpoints_conversion.megatron_source import open_megatron
from checkpoints_conversion.megatron_to_hf import MegatronToHf, convert
from checkpoints_conversion.model_card import MODEL_CARD
from checkpoints_conversion.options import CheckpointSource, check_source
from megatron_ft.models.hf_source import HfSource


def campaign(folder: Path, flips: int, seed: int = 0) -> dict[str, Flips]:
    """By kind of folder; half of the flips hit every file as often, half hit files by their size."""
    make_sound(folder)
    convert(MegatronToHf(str(folder / "torch"), str(folder / "export"), max_shard_size="60KB"))
    readers = {
        "torch": lambda: open_megatron(folder / "torch", CheckpointSource()),
        "torch_dist": lambda: open_megatron(folder / "torch_dist", CheckpointSource()),
        "export": lambda: (check_source(folder / "export", True), HfSource(folder / "export")),
    }
    results = {}
    for kind, read in readers.items():
        files = sorted(path for path in (folder / kind).rglob("*") if path.is_file() and path.name != MODEL_CARD)
        some = flips // len(readers) // 2
        results[kind] = flip_bits(files, read, some, seed) + flip_bits(files, read, some, seed + 1, by_size=True)
    return results


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--flips", type=int, default=30_000)
    parser.add_argument("--seed", type=int, default=0)
    arguments = parser.parse_args()
    with TemporaryDirectory() as folder:
        results = campaign(Path(folder) / "made", arguments.flips, arguments.seed)
    for kind, result in results.items():
        print(f"{kind}: {result}")
        for line in [*result.accepted, *result.unnamed, *result.crashed][:10]:
            print(f"  {line}")
    sys.exit(any(result.refused != result.total for result in results.values()))


if __name__ == "__main__":
    main()
