"""The report of a finished conversion."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from math import prod
from pathlib import Path

from megatron_ft.models.architecture import Architecture
from megatron_ft.models.weights import Rule, placed_rules


@dataclass(frozen=True)
class Report:
    """A report. parameters: of the model, without padding and copies. tensors: number in Hugging Face's format."""

    folder: Path
    parameters: int
    tensors: int
    files: int
    seconds: float
    note: str = ""

    def __str__(self) -> str:
        minutes, seconds = divmod(round(self.seconds), 60)
        files = "shard" if self.files == 1 else "shards"
        return (
            f"{human(self.parameters)} parameters, {self.tensors} tensors, {self.files} {files}, "
            f"{minutes}:{seconds:02d}{', ' * bool(self.note)}{self.note} -> {self.folder}"
        )


def human(count: int) -> str:
    """Return 3400000 as "3.4 M"."""
    for unit, name in ((10**9, " B"), (10**6, " M"), (10**3, " k")):
        if count >= unit:
            return f"{count / unit:.1f}{name}"
    return str(count)


def count(arch: Architecture, rules: Iterable[Rule]) -> tuple[int, int]:
    """Return (parameters, Hugging Face tensors) of the whole model."""
    placed = list(placed_rules(arch, list(rules)))
    return sum(prod(one.rule.full_shape(arch)) for one in placed), sum(len(one.hf_keys) for one in placed)
