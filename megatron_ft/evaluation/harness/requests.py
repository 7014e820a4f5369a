"""Requests and results of lm-eval as plain data: batches of rows, sampling, rows of a table. lm_eval itself is not needed."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import torch

from megatron_ft.errors import ConfigError
from megatron_ft.generation.sampling import GREEDY, Sampling

_SAMPLING = {"temperature", "top_k", "top_p", "repetition_penalty", "do_sample"}


def batches_of(lengths: Sequence[int], size: int, pads: bool) -> Iterator[list[int]]:
    """Yield the numbers of rows of similar length together, the longest first. pads: rows of unequal length may share a batch."""
    batch: list[int] = []
    for i in sorted(range(len(lengths)), key=lambda i: -lengths[i]):
        unequal = batch and lengths[i] != lengths[batch[0]] and not pads
        if len(batch) == size or unequal:
            yield batch
            batch = []
        batch.append(i)
    if batch:
        yield batch


def padded(rows: Sequence[Sequence[int]]) -> torch.Tensor:
    """Return rows of ids as one tensor, padded to the right with zeros."""
    found = torch.zeros(len(rows), max(map(len, rows)), dtype=torch.long)
    for line, row in zip(found, rows, strict=True):
        line[: len(row)] = torch.tensor(row)
    return found


def sampling_of(options: Mapping[str, Any]) -> Sampling:
    """Return the sampling of a task's generation_kwargs. Raise ConfigError for an option that there is not."""
    if unknown := sorted(set(options) - _SAMPLING):
        raise ConfigError(f"generation_kwargs of a task: {unknown[0]} is not supported; take it out of the task")
    penalty = options.get("repetition_penalty", 1.0)
    if not options.get("do_sample"):
        return Sampling(repetition_penalty=penalty) if penalty != 1 else GREEDY
    return Sampling(options.get("temperature", 1.0), options.get("top_k", 0), options.get("top_p", 1.0), penalty)


def table_rows(results: Mapping[str, Any]) -> list[tuple[str, str, str, str]]:
    """Return task, few-shot examples, metric and value of every score."""
    found = []
    for task, values in sorted(results["results"].items()):
        shots = str(results.get("n-shot", {}).get(task, ""))
        for key, value in values.items():
            metric, _, filtered = key.partition(",")
            if isinstance(value, int | float) and filtered and not metric.endswith("_stderr"):
                name = metric if filtered == "none" else f"{metric} ({filtered})"
                error = values.get(f"{metric}_stderr,{filtered}")
                spread = f" ± {error:.4f}" if isinstance(error, float) else ""
                found.append((task, shots, name, f"{value:.4f}{spread}"))
    return found
