"""Flips random bits of files, one at a time, and counts which of them a reader takes without a word.

What is measured is silent acceptance: a flipped bit that is neither refused with an error of ours nor without effect on what
is read. Campaigns over shards, checkpoints and exports bring their own files and reader; this file only flips and counts.
"""

from __future__ import annotations

import argparse
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from tempfile import TemporaryDirectory

import numpy as np

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from megatron_ft.errors import UserError


@dataclass
class Flips:
    """What became of the flips. refused: an error of ours that names the file; unnamed: one that does not; accepted: the reader
    returned; crashed: it raised anything else. Each of the last three holds "file, bit n: what happened" lines.
    """

    refused: int = 0
    unnamed: list[str] = field(default_factory=list)
    accepted: list[str] = field(default_factory=list)
    crashed: list[str] = field(default_factory=list)

    @property
    def total(self) -> int:
        return self.refused + len(self.unnamed) + len(self.accepted) + len(self.crashed)

    def __str__(self) -> str:
        return (
            f"{self.total:,} flips: {self.refused:,} refused by name, {len(self.unnamed):,} refused without the file's name, "
            f"{len(self.accepted):,} accepted, {len(self.crashed):,} crashed"
        )

    def __add__(self, other: Flips) -> Flips:
        return Flips(
            self.refused + other.refused, self.unnamed + other.unnamed,
            self.accepted + other.accepted, self.crashed + other.crashed,
        )  # fmt: skip


def flip_bits(
    files: Sequence[Path],
    read: Callable[[], object],
    flips: int,
    seed: int = 0,
    by_size: bool = False,
    names: Callable[[Path], Sequence[str]] = lambda path: (path.name,),
    seconds: float = 1e9,
) -> Flips:
    """Flip `flips` bits in place, one at a time, each put right again before the next.

    read: reads everything as a user's command would, raising UserError where it refuses; it must succeed on the whole files.
    by_size: large files are hit more often, as by cosmic rays; without it every file as often as any other.
    names: what a message about a file has to hold, one of them; its name unless said. seconds: fewer flips where that time is up.
    """
    read()
    rng = np.random.default_rng(seed)
    paths = [path for path in files if path.stat().st_size]
    sizes = np.array([path.stat().st_size for path in paths], float)
    shares = sizes / sizes.sum() if by_size else np.full(len(paths), 1 / len(paths))
    result = Flips()
    until = time.monotonic() + seconds
    for number in rng.choice(len(paths), flips, p=shares):
        if time.monotonic() > until:
            break
        path = paths[number]
        bit = int(rng.integers(8 * int(sizes[number])))
        _flip(path, bit)
        try:
            _judge(path, bit, read, names(path), result)
        finally:
            _flip(path, bit)
    read()
    return result


def command(doc: str | None, flips: int, campaign: Callable[[Path, int, int, float], Flips]) -> None:
    """A campaign as a script: its flags, its count, what went wrong; exit code 1 where a flip was not refused by name.

    flips: how many unless said. campaign: takes an empty folder, flips, seed, seconds.
    """
    parser = argparse.ArgumentParser(description=doc, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--flips", type=int, default=flips)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--seconds", type=float, default=1e9, help="stop after so many")
    arguments = parser.parse_args()
    with TemporaryDirectory() as folder:
        result = campaign(Path(folder), arguments.flips, arguments.seed, arguments.seconds)
    print(result)
    for line in [*result.accepted, *result.unnamed, *result.crashed][:20]:
        print(f"  {line}")
    sys.exit(result.refused != result.total)


def _judge(path: Path, bit: int, read: Callable[[], object], names: Sequence[str], result: Flips) -> None:
    where = f"{path.name}, bit {bit}"
    try:
        read()
    except UserError as error:
        if any(name in str(error) for name in names):
            result.refused += 1
        else:
            result.unnamed.append(f"{where}: {error}")
    except Exception as error:
        result.crashed.append(f"{where}: {type(error).__name__}: {error}")
    else:
        result.accepted.append(f"{where}: accepted")


def _flip(path: Path, bit: int) -> None:
    with path.open("r+b") as file:
        file.seek(bit // 8)
        byte = file.read(1)[0]
        file.seek(bit // 8)
        file.write(bytes([byte ^ 1 << bit % 8]))
