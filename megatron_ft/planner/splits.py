"""Divisions of any number of layers over stages, and the flags that make finetune divide them so."""

from __future__ import annotations

import shlex
from itertools import groupby

from megatron_ft.config.sections import Parallelism
from megatron_ft.models.pipeline import PipelineSplit, split_layers


def nearly_even(num_layers: int, stages: int, chunks: int = 1) -> PipelineSplit | None:
    """Return the split into stages x chunks whose sizes differ by at most one layer; None if there are fewer layers than chunks.

    The last chunk gets fewer, because it has the logits too, then the first, which has the embedding and the most microbatches in flight;
    then those near the beginning.
    """
    each, more = divmod(num_layers, stages * chunks)
    if not each:
        return None
    order = sorted(range(stages * chunks), key=lambda at: (at == stages * chunks - 1, at == 0, -at))
    counts = [each] * (stages * chunks)
    for at in order[:more]:
        counts[at] += 1
    if stages == 1:
        return split_layers(num_layers, Parallelism())
    return split_layers(
        num_layers, Parallelism(pipeline_model_parallel_size=stages, pipeline_model_parallel_layout=written(counts))
    )


def flags_of(split: PipelineSplit) -> list[str]:
    """Return finetune's flags for a split, the shortest that there are."""
    counts = [len(stage[k]) for k in range(split.virtual_size) for stage in split.chunks]
    found = [f"--pipeline_model_parallel_size {split.stages}"]
    if len(set(counts)) == 1:
        virtual = split.virtual_size
        return found + ([f"--virtual_pipeline_model_parallel_size {virtual}"] if virtual > 1 else [])
    if split.virtual_size == 1 and len(set(counts[1:-1])) == 1:
        first, last = (f"--decoder_{end}_pipeline_num_layers" for end in ("first", "last"))
        return [*found, f"{first} {counts[0]}", f"{last} {counts[-1]}"]
    return [*found, f"--pipeline_model_parallel_layout {shlex.quote(written(counts))}"]


def written(counts: list[int]) -> str:
    """Return the layers of all chunks, in the order in which layers run, as --pipeline_model_parallel_layout takes them."""
    runs = [(_layers(count), len(list(same))) for count, same in groupby(counts)]
    text = "".join(f"({one}|)*{times}" if times > 1 else f"{one}|" for one, times in runs[:-1])
    one, times = runs[-1]
    text += {1: "", 2: f"{one}|"}.get(times, f"({one}|)*{times - 1}")
    return f"E{text}{one}L"


def _layers(count: int) -> str:
    return "t" if count == 1 else f"t*{count}"
