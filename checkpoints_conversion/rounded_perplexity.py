"""The perplexity of a checkpoint before and after its weights are rounded, layer by layer, in a process of its own.

    echo FOLDER | python -m checkpoints_conversion.rounded_perplexity

FOLDER/request.json says how weights are rounded, FOLDER/held_out.npy has the tokens. It writes FOLDER/answer.json.
"""

from __future__ import annotations

import math
import sys
import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from checkpoints_conversion.held_out import in_words, rows_of
from checkpoints_conversion.options import CheckpointSource, QuantisedExport, stated_of
from checkpoints_conversion.own_process import answer_alone, ask

if TYPE_CHECKING:
    from checkpoints_conversion.megatron_source import Opened

NOT_MEASURED = "not measured: give --calibration"


@dataclass(frozen=True)
class Request:
    """The input of the process."""

    checkpoint: str
    """The release or iter_ folder."""
    stated: dict[str, Any]
    """How it is read, as CheckpointSource."""
    tokens: str
    """Folder of held_out.npy."""
    quantize: str
    dtype: str | None
    """That weights are cast to before; None: as they are."""


@dataclass(frozen=True)
class Answer:
    """Perplexity before and after."""

    perplexity: tuple[float, float]


def held_out_of(source: Opened, options: QuantisedExport) -> np.ndarray | None:
    """Return the tokens that perplexity is computed of; None without --calibration. Raise ConfigError for those that do not fit."""
    return rows_of(options, source.config.architecture)[1] if options.calibration else None


def described(source: Opened, options: QuantisedExport, dtype: str | None, held_out: np.ndarray | None) -> str:
    """Measure. Return the model card's words about it."""
    if held_out is None:
        return NOT_MEASURED
    with tempfile.TemporaryDirectory() as scratch:
        np.save(Path(scratch) / "held_out.npy", held_out)
        request = Request(str(source.folder), stated_of(options), scratch, str(options.quantize), dtype)
        name = "checkpoints_conversion.rounded_perplexity"
        answer = Answer(**ask(name, request, Path(scratch), "the measurement of perplexity"))
    return in_words(answer.perplexity, held_out)


def measure(request: Request) -> Answer:
    """Run the tokens through the model with weights as they are, and as the format has them."""
    import torch

    from checkpoints_conversion.layerwise import Comparison
    from checkpoints_conversion.megatron_source import open_megatron
    from checkpoints_conversion.rounding import rounder
    from megatron_ft.engine.parallel import process_groups
    from megatron_ft.models.weights import placed_rules

    opened = open_megatron(Path(request.checkpoint), CheckpointSource(**request.stated))
    with process_groups() as layout, torch.no_grad():
        arch = opened.config.architecture
        rounded = rounder(request.quantize, arch, list(placed_rules(arch, opened.rules)))
        work = Comparison(opened, layout, Path(request.tokens), request.dtype, rounded)
        before, after = work.losses()
    return Answer((math.exp(before), math.exp(after)))


if __name__ == "__main__":
    answer_alone(Path(sys.stdin.read().strip()), Request, measure)
