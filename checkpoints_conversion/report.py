"""The report of a finished conversion."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from math import prod
from pathlib import Path

from megatron_ft.models.architecture import Architecture
from megatron_ft.models.weights import Rule, placed_rules
from megatron_ft.wording import counted, human


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
        return (
            f"{human(self.parameters)} parameters, {counted(self.tensors, 'tensor')}, {counted(self.files, 'shard')}, "
            f"{minutes}:{seconds:02d}{', ' * bool(self.note)}{self.note} -> {self.folder}"
        )


def count(arch: Architecture, rules: Iterable[Rule]) -> tuple[int, int]:
    """Return (parameters, Hugging Face tensors) of the whole model."""
    placed = list(placed_rules(arch, list(rules)))
    return sum(prod(one.rule.full_shape(arch)) for one in placed), sum(len(one.hf_keys) for one in placed)
