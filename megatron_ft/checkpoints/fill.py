"""Fills a built model from whole tensors of any source: an export, or a checkpoint of another layout."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from megatron_ft.engine.parallel import Layout
from megatron_ft.models.architecture import Architecture
from megatron_ft.models.weights import Placed, Rule, pad_rows, placed_rules


@torch.no_grad()
def fill_from(
    model: Any, arch: Architecture, rules: Sequence[Rule], full: Callable[[Placed], Tensor], layout: Layout
) -> None:
    """Fill a bare model, one whole tensor at a time, of which this rank keeps its part."""
    slots = dict(model.named_parameters())
    for placed in placed_rules(arch, rules, layout.pp_size, layout.pp_rank):
        whole = full(placed)
        if placed.rule.cut == "vocab_parallel":
            whole = pad_rows(whole, model.vocab_size)
        part = placed.rule.part(whole, layout.tp_size, layout.tp_rank, layout.ep_size, layout.ep_rank)
        for name, values in placed.parameters(part):
            slots.pop(name).copy_(values)
    assert not slots, f"not filled: {sorted(slots)}"
