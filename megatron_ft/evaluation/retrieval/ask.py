"""Ask a model every prompt, in any layout, and score the answers."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch.distributed as dist
from megatron.core import parallel_state

from megatron_ft.engine.parallel import Layout
from megatron_ft.errors import ConfigError
from megatron_ft.evaluation.retrieval.cases import Case, Grid, make_cases, places
from megatron_ft.generation.loading import ChatModel
from megatron_ft.generation.sampling import GREEDY


def answers(
    model: ChatModel, layout: Layout, grid: Grid, system: str | None, max_new_tokens: int, batch_size: int
) -> list[dict[str, Any]]:
    """Return task, length, depth, expected, answer, score and more of every prompt, the same on all ranks.

    Data-parallel ranks take every dp_size-th prompt.
    """

    def messages(text: str) -> list[dict[str, str]]:
        return [*([{"role": "system", "content": system}] if system else []), {"role": "user", "content": text}]

    mine = places(grid)[layout.dp_rank :: layout.dp_size]
    cases = list(make_cases(grid, mine, lambda text: len(model.prompt_ids(messages(text))), max_new_tokens))
    said = model.answers([messages(case.text) for case in cases], max_new_tokens, GREEDY, batch_size)
    rows = [_row(case, answer) for case, answer in zip(cases, said, strict=True)]
    return _gathered(rows, layout, len(places(grid)))


def _row(case: Case, answer: str) -> dict[str, Any]:
    return {
        "task": case.task.name,
        "length": case.length,
        "depth": case.depth,
        "tokens": case.tokens,
        "expected": list(case.expected),
        "answer": answer,
        "score": case.task.score(answer, case.expected),
    }


def _gathered(rows: Sequence[dict[str, Any]], layout: Layout, count: int) -> list[dict[str, Any]]:
    shares: list[Any] = [None] * layout.dp_size
    dist.all_gather_object(shares, list(rows), group=parallel_state.get_data_parallel_group())
    return [shares[i % layout.dp_size][i // layout.dp_size] for i in range(count)]


def allow_lengths(model: ChatModel, name: str, longest: int, beyond_positions: bool) -> None:
    """Let the model read prompts of `longest` tokens. Raise ConfigError if it has fewer positions, unless beyond_positions."""
    positions = model.decoder.max_positions
    if longest <= positions:
        return
    if not beyond_positions:
        raise ConfigError(
            f"--lengths {longest}: {name} has {positions} positions; give shorter --lengths, extend its context (hf-to-megatron or "
            "finetune with --rope_scaling_type and --rope_scaling_factor), or add --beyond_positions to measure how it fails there"
        )
    model.decoder.max_positions = longest
