"""Gradients are computed down to the embedding only where something needs them."""

from types import SimpleNamespace

import pytest
import torch
from torch import nn

from megatron_ft.models.trainable import Trainable


class Chunk(nn.Module):
    """What `freeze_others` reads of a chunk: an embedding and a matrix."""

    def __init__(self, recompute):
        super().__init__()
        self.config = SimpleNamespace(recompute_granularity=recompute)
        self.embedding, self.linear = nn.Embedding(5, 3), nn.Linear(3, 2)


@pytest.mark.parametrize(
    ("recompute", "trained", "asked"),
    [(None, "linear", False), ("full", "linear", True), ("selective", "linear", True), (None, "nothing", True), (None, "embedding", True)],
)  # fmt: skip
def test_the_embedding_output(recompute, trained, asked):
    """Recomputed layers and a stage that trains nothing ask for it; a trained embedding has it anyway."""
    chunk = Chunk(recompute)
    Trainable((trained,)).freeze_others(chunk)
    assert chunk.embedding(torch.tensor([1])).requires_grad == asked
