"""Trains predictors of a model's activations on documents, and measures what they change: recall by layer, perplexity."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from megatron_ft.engine.parallel import Layout
from megatron_ft.errors import DataError
from megatron_ft.evaluation.perplexity import Document
from megatron_ft.evaluation.scoring import Scorer
from megatron_ft.models.architecture import Architecture
from megatron_ft.sparse.fitting import Fitting, Quality, fit, quality
from megatron_ft.sparse.model import first_matrix
from megatron_ft.sparse.predictors import Thin

HELD_OUT = 5
"""One row of so many is not trained on."""
_AT_ONCE = 1 << 31
"""Bytes of inputs that are held at once; for more layers the rows are read again."""


@dataclass(frozen=True)
class Text:
    """Rows of tokens [n, length]: those that predictors are trained on, and those that they are measured on."""

    train: Tensor
    held_out: Tensor


def cut(documents: Sequence[Document], length: int, tokens: int, seed: int) -> Text:
    """Return rows of `length` tokens of documents, about `tokens` in all, in an order by seed. Raise DataError if they are too few."""
    ids = torch.cat([torch.from_numpy(one.ids.astype("int64")) for one in documents])
    rows = ids[: len(ids) // length * length].view(-1, length)
    order = torch.randperm(len(rows), generator=torch.Generator().manual_seed(seed))
    rows = rows[order[: max(HELD_OUT, tokens // length)]]
    if len(rows) < HELD_OUT:
        raise DataError(
            f"--data has {len(ids):,} tokens, {HELD_OUT} rows of {length} are the least: give more text, or a smaller --seq_length"
        )
    which = torch.arange(len(rows)) % HELD_OUT == 0
    return Text(rows[~which], rows[which])


def train(
    model: Any, layout: Layout, arch: Architecture, text: Text, how: Fitting, told: Callable[[int, Quality], None]
) -> tuple[list[Thin], list[Quality]]:
    """Return each layer's predictor and its quality on the held-out rows. told: is called after each layer."""
    layers: list[Thin] = []
    qualities: list[Quality] = []
    size = 4 * arch.hidden_size * (text.train.numel() + text.held_out.numel())
    for group in torch.arange(arch.num_layers).split(max(1, _AT_ONCE // size)):
        numbers = group.tolist()
        seen, unseen = (inputs_of(model, layout, rows, numbers) for rows in (text.train, text.held_out))
        for number in numbers:
            matrix = first_matrix(model.decoder.layers[number].mlp, arch).float()
            layers.append(fit(matrix, seen.pop(number), how))
            qualities.append(quality(matrix, unseen.pop(number), layers[-1]))
            told(number, qualities[-1])
    return layers, qualities


def inputs_of(model: Any, layout: Layout, rows: Tensor, numbers: Sequence[int]) -> dict[int, Tensor]:
    """Return what the MLPs of these layers read, [tokens, hidden] fp32, for rows of tokens."""
    found: dict[int, list[Tensor]] = {number: [] for number in numbers}

    def keep(number: int) -> Callable:
        return lambda module, inputs: found[number].append(inputs[0].detach().reshape(-1, inputs[0].shape[-1]).float())

    handles = [model.decoder.layers[number].mlp.register_forward_pre_hook(keep(number)) for number in numbers]
    try:
        perplexity(model, layout, rows)
    finally:
        for handle in handles:
            handle.remove()
    return {number: torch.cat(parts) for number, parts in found.items()}


def perplexity(model: Any, layout: Layout, rows: Tensor) -> float:
    """Return the perplexity of all tokens after the first of each row."""
    scorer = Scorer(model, layout)
    nats = [-scorer.score(row[None]).log_probs.double().sum() for row in rows]
    return math.exp(float(sum(nats)) / (rows.shape[0] * (rows.shape[1] - 1)))
