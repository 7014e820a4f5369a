"""The layers of each pipeline stage: divided evenly, interleaved in chunks (virtual stages), or unevenly.

Only arithmetic, without torch and engine, so that an impossible split is refused before processes wait for each other. Sources:
interleaving, Narayanan et al. 2021; the letters of a written layout are megatron-core's (pipeline_parallel_layer_layout.py).
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from itertools import accumulate, pairwise

from megatron_ft.config.sections import Parallelism
from megatron_ft.errors import ConfigError
from megatron_ft.wording import counted


@dataclass(frozen=True)
class PipelineSplit:
    """chunks[stage][k]: the layers of a stage's k-th chunk, global numbers from 0. Layers run through chunk 0 of every stage, then
    chunk 1 of every stage, and so on.
    """

    chunks: tuple[tuple[range, ...], ...]

    @property
    def stages(self) -> int:
        return len(self.chunks)

    @property
    def virtual_size(self) -> int:
        """Return the chunks per stage; 1 without interleaving."""
        return len(self.chunks[0])

    @property
    def is_plain(self) -> bool:
        """Return whether there is one chunk per stage, all of one size, which classic checkpoints and generation require."""
        return self.virtual_size == 1 and len({len(stage[0]) for stage in self.chunks}) == 1

    def layers_of(self, stage: int) -> list[int]:
        """Return all layers of a stage, in order."""
        return [layer for chunk in self.chunks[stage] for layer in chunk]

    def for_engine(self) -> list[list[str]] | None:
        """Return megatron-core's pipeline_model_parallel_layout: the parts of every chunk, in the order of layers; None: the engine's
        default.
        """
        if self.stages == 1:
            return None
        parts = [["decoder"] * len(stage[k]) for k in range(self.virtual_size) for stage in self.chunks]
        parts[0].insert(0, "embedding")
        parts[-1].append("loss")
        return parts

    def __str__(self) -> str:
        return " | ".join(", ".join(_span(chunk) for chunk in stage) for stage in self.chunks)


def _span(layers: range) -> str:
    """Return a range of layers as text, counted from 1."""
    ends = dict.fromkeys((layers.start + 1, layers.stop))  # a single layer is named once
    return "-".join(map(str, ends)) if layers else "none"


def split_layers(num_layers: int, parallel: Parallelism) -> PipelineSplit:
    """Return the split that the flags define. Raise ConfigError for one that does not divide evenly, with values that do."""
    stages = parallel.pipeline_model_parallel_size
    if parallel.pipeline_model_parallel_layout:
        return _written(num_layers, parallel)
    virtual = _virtual_size(num_layers, parallel)
    counts = [count for per_chunk in [_per_chunk(num_layers, parallel, virtual)] * virtual for count in per_chunk]
    return _from_counts(counts, stages)


def plain_split(num_layers: int, stages: int) -> PipelineSplit:
    """Return the even split without chunks."""
    return split_layers(num_layers, Parallelism(pipeline_model_parallel_size=stages))


def split_beside(split: PipelineSplit, num_layers: int, layers: int) -> PipelineSplit:
    """Return the stages of a model of so many `layers` beside one of `num_layers` with this split: the same, else as many chunks of even
    size. Raise ConfigError if they do not divide.
    """
    if layers == num_layers:
        return split
    chunks = split.virtual_size if split.virtual_size > 1 else None
    return split_layers(
        layers, Parallelism(pipeline_model_parallel_size=split.stages, virtual_pipeline_model_parallel_size=chunks)
    )


def _from_counts(counts: list[int], stages: int) -> PipelineSplit:
    """Return the split for the layers of each chunk (counts), in the order in which layers run."""
    chunks = [range(start, stop) for start, stop in pairwise(accumulate(counts, initial=0))]
    return PipelineSplit(tuple(tuple(chunks[stage::stages]) for stage in range(stages)))


def _virtual_size(num_layers: int, parallel: Parallelism) -> int:
    stages, each = parallel.pipeline_model_parallel_size, parallel.num_layers_per_virtual_pipeline_stage
    if each is None:
        return parallel.virtual_pipeline_model_parallel_size or 1
    if num_layers % (stages * each):
        raise ConfigError(
            f"--num_layers_per_virtual_pipeline_stage {each} x --pipeline_model_parallel_size {stages} = {stages * each} does not "
            f"divide the model's num_layers {num_layers}; layers a chunk that do: {_divisors(num_layers, stages)}"
        )
    return num_layers // (stages * each)


def _per_chunk(num_layers: int, parallel: Parallelism, virtual: int) -> list[int]:
    """Return the layers of each stage in one round of chunks."""
    stages = parallel.pipeline_model_parallel_size
    first, last = parallel.decoder_first_pipeline_num_layers, parallel.decoder_last_pipeline_num_layers
    ends = [count for count in (first, last) if count is not None]
    left, middle = num_layers - sum(ends), stages - len(ends)
    if not ends and left < middle * virtual:
        raise ConfigError(
            f"--pipeline_model_parallel_size {stages}{f' x {virtual} chunks' if virtual > 1 else ''} is more than the model's "
            f"num_layers {num_layers}; sizes that do: {_divisors(left, virtual)}"
        )
    if left < middle or (middle <= 0 and left):
        raise ConfigError(
            f"--decoder_first_pipeline_num_layers {first} and --decoder_last_pipeline_num_layers {last} leave {left} of the model's "
            f"{num_layers} layers to {counted(middle, 'stage')} of --pipeline_model_parallel_size {stages}: choose others"
        )
    even = left // (middle * virtual) if middle else 0
    counts = [even] * stages
    for at, count in ((0, first), (-1, last)):
        if count is not None:
            counts[at], uneven = divmod(count, virtual)
            if uneven:
                raise ConfigError(
                    f"a stage of {counted(count, 'layer')} cannot be cut into {counted(virtual, 'chunk')} "
                    f"(--virtual_pipeline_model_parallel_size): use {counted(count // virtual * virtual or virtual, 'layer')}"
                )
    if sum(counts) * virtual != num_layers:
        cut = f" x {virtual} chunks" if virtual > 1 else ""
        raise ConfigError(
            f"--pipeline_model_parallel_size {stages}{cut} does not divide the model's "
            f"{'num_layers' if not ends else 'remaining layers'} {left}; sizes that do: {_divisors(left, virtual)}; or set the "
            f"layers of the ends: --decoder_first_pipeline_num_layers, --decoder_last_pipeline_num_layers"
        )
    return counts


def _divisors(size: int, times: int, at_most: int = 64) -> str:
    """Return the numbers d for which d x times divides size."""
    found = [d for d in range(1, min(size, at_most) + 1) if size % (d * times) == 0]
    return ", ".join(map(str, found)) or "none"


def _written(num_layers: int, parallel: Parallelism) -> PipelineSplit:
    """Return the split in --pipeline_model_parallel_layout, in Megatron's notation: E embedding, t a layer, L loss, | between chunks, *n
    repeats.
    """
    text, stages = parallel.pipeline_model_parallel_layout or "", parallel.pipeline_model_parallel_size
    where = f"--pipeline_model_parallel_layout {text}"
    expanded = _expanded(text)
    chunks = expanded.split("|")
    if not re.fullmatch(r"E[t|]*L", expanded):
        raise ConfigError(
            f"{where}: write E, then t for every layer, then L, with | between chunks, as in Et*3|(tt|)*2t*3L"
        )
    if len(chunks) % stages:
        raise ConfigError(
            f"{where}: {counted(len(chunks), 'chunk')}, not a multiple of --pipeline_model_parallel_size {stages}: add or join some"
        )
    counts = [chunk.count("t") for chunk in chunks]
    if sum(counts) != num_layers:
        raise ConfigError(f"{where}: {counted(sum(counts), 'layer')}, the model has {num_layers}: write that many t")
    return _from_counts(counts, stages)


def _expanded(text: str) -> str:
    """Return the layout without repeats: (tt|)*2 is tt|tt|."""
    text = re.sub(r"[\s,]", "", text)
    repeat = re.compile(r"(?:\(([^()]*)\)|([EtL|]))\*(\d{1,4})")
    while match := repeat.search(text):
        text = text[: match.start()] + (match[1] or match[2] or "") * int(match[3]) + text[match.end() :]
    return text.replace("(", "").replace(")", "")
