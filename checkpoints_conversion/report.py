"""What a conversion says when it is done, and where it may write."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from math import prod
from pathlib import Path

from megatron_ft.errors import CheckpointError
from megatron_ft.files import refuse_existing
from megatron_ft.models.architecture import Architecture
from megatron_ft.models.weights import Rule, placed_rules


@dataclass(frozen=True)
class Report:
    """parameters: numbers in the model, padding and copies not counted; tensors: as Hugging Face counts them."""

    folder: Path
    parameters: int
    tensors: int
    files: int
    seconds: float

    def __str__(self) -> str:
        minutes, seconds = divmod(round(self.seconds), 60)
        files = "shard" if self.files == 1 else "shards"
        return (
            f"{human(self.parameters)} parameters, {self.tensors} tensors, {self.files} {files}, "
            f"{minutes}:{seconds:02d} -> {self.folder}"
        )


def human(count: int) -> str:
    """3400000 -> "3.4 M"."""
    for unit, name in ((10**9, " B"), (10**6, " M"), (10**3, " k")):
        if count >= unit:
            return f"{count / unit:.1f}{name}"
    return str(count)


def count(arch: Architecture, rules: Iterable[Rule]) -> tuple[int, int]:
    """(parameters, Hugging Face tensors) of the whole model."""
    placed = list(placed_rules(arch, list(rules)))
    return sum(prod(one.rule.full_shape(arch)) for one in placed), sum(len(one.hf_keys) for one in placed)


def check_target(input_dir: Path, output_dir: Path, overwrite: bool, ours: set[str], marker: str) -> None:
    """Refuse to write where something would be lost.

    An existing folder is replaced only with --overwrite, and then only one that an earlier conversion made: it holds
    `marker`, and nothing beyond the names in `ours` (empty: any). Raises UserError.
    """
    source, target = input_dir.resolve(), output_dir.resolve()
    if target == source or source.is_relative_to(target) or target.is_relative_to(source):
        raise CheckpointError(
            f"--output_dir {output_dir} and --input_dir {input_dir} lie in each other: choose another"
        )
    if not overwrite:
        refuse_existing(output_dir)
    elif output_dir.is_dir() and any(output_dir.iterdir()):
        strange = sorted(p.name for p in output_dir.iterdir() if ours and p.name not in ours)
        if strange or not (output_dir / marker).exists():
            what = f"holds {strange[0]}" if strange else f"has no {marker}"
            raise CheckpointError(
                f"{output_dir} {what}, so no earlier conversion made it and --overwrite leaves it alone: choose another"
            )
