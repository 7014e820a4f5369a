"""Microbatches on their way to the device: built ahead by a thread, cut to this rank's part, copied without making the host wait.

Reading a packed row of 4,096 positions and laying it out takes the host 0.3 ms, and longer from a slow disk. Without the thread the queue
of the GPU would be empty meanwhile. The thread builds two microbatches ahead, also across the end of a step: the next rows are known,
because they are a function of the number of rows consumed.
"""

from __future__ import annotations

import contextlib
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from megatron_ft import device
from megatron_ft.data.loader import ChatDataset, Microbatch
from megatron_ft.engine.parallel import Layout
from megatron_ft.models.dropout import token_keys
from megatron_ft.models.rows import RowParams, one_sample_a_row, packed_rows, places
from megatron_ft.training.throughput import pairs

AHEAD = 2
"""Microbatches that are built before they are asked for."""

TOP = ("top_ids", "top_log_probs", "tail")


@dataclass(frozen=True)
class Inputs:
    """A microbatch on the device; this rank's positions under context parallelism. A packed batch is one row, b = 1."""

    tokens: Tensor
    """[b, s] int64"""
    labels: Tensor
    """[b, s] int64"""
    weights: Tensor
    """[b, s] fp32"""
    groups: Tensor
    """[breakdowns, b, s] int64, see data.loader.Microbatch"""
    rows: RowParams | None
    """Arguments of the layers; None: no arguments."""
    counts: np.ndarray
    """[3] float64: real tokens, supervised tokens, pairs of tokens in which one attends to the other"""
    top: tuple[Tensor, ...] = ()
    """A stored teacher's most likely tokens, on the last stage: ids [k, b, s], log-probabilities [k, b, s] fp16, tail [b, s] fp32; or
    nothing"""

    @property
    def position_ids(self) -> Tensor:
        """[b, s]. The engine's embedding requires them; the rotary embedding computes its own."""
        return torch.arange(self.tokens.shape[1], device=self.tokens.device).expand_as(self.tokens)


@dataclass(frozen=True)
class _Task:
    """The source of one microbatch; equal tasks make equal microbatches."""

    dataset: ChatDataset
    rows: tuple[int, ...]
    end: int | None
    dropping: bool


@dataclass(frozen=True)
class _Built:
    """A microbatch in (pinned) host memory. tensors: by field of Inputs, and keys, positions, boundaries where there are any."""

    tensors: dict[str, Tensor]
    lengths: list[int] | None
    width: int
    counts: np.ndarray


class InputStream:
    """Gives a rank its microbatches. dropout_seed: of the residual dropout's keys, None: no dropout; window: of the model's attention."""

    def __init__(self, layout: Layout, dropout_seed: int | None, window: int | None):
        self.layout, self.dropout_seed, self.window = layout, dropout_seed, window
        self.device = device.current_device()
        self._pool = ThreadPoolExecutor(1, "inputs", device.adopt, (self.device,))
        self._ready: deque[tuple[_Task, Future]] = deque()

    def step(
        self, dataset: ChatDataset, rows_of: Sequence[list[int]], end: int | None = None, dropping: bool = False,
        waiting: Callable[[], contextlib.AbstractContextManager] = contextlib.nullcontext, then: Sequence[list[int]] = (),
    ) -> Iterator[Inputs]:  # fmt: skip
        """Yield the microbatches of these rows, in order. Rows from `end` on are empty; dropping: with dropout keys.

        waiting: entered while the host waits for one to be built. then: rows that will be asked for next, to build ahead.
        """
        tasks = [_Task(dataset, tuple(rows), end, dropping) for rows in rows_of]
        later = [_Task(dataset, tuple(rows), end, dropping) for rows in then[:AHEAD]]
        queue = [*tasks, *later]
        for number in range(len(tasks)):
            for task in queue[number : number + 1 + AHEAD]:
                self._begin(task, queue[number:])
            with waiting():
                built = self._ready.popleft()[1].result()
            yield self._placed(built)

    def _begin(self, task: _Task, expected: list[_Task]) -> None:
        """Start building a task, unless it is being built. Tasks that were built ahead and are not needed are dropped."""
        known = [begun for begun, _ in self._ready]
        if known != expected[: len(known)]:
            self._ready.clear()
            known = []
        if task not in known:
            self._ready.append((task, self._pool.submit(self._build, task)))

    def _build(self, task: _Task) -> _Built:
        """Run by the thread."""
        batch = task.dataset.microbatch(task.rows, task.end)
        arrays = {name: getattr(batch, name) for name in ("tokens", "labels", "weights", "groups")}
        if task.dataset.scored and self.layout.is_last_stage:
            arrays |= zip(TOP, task.dataset.top(task.rows, task.end), strict=True)
        if self.layout.cp_size > 1:
            arrays = {name: own_positions(array, self.layout, -1) for name, array in arrays.items()}
        if batch.segments is not None:  # the rows of a packed batch are one long row
            arrays = {name: x.reshape(*x.shape[:-2], 1, -1) for name, x in arrays.items()}
            arrays["positions"], arrays["boundaries"] = places(batch.segments)
        if task.dropping and self.dropout_seed is not None:
            arrays["keys"] = self._keys(self.dropout_seed, batch, task.rows)
        tensors = {name: device.pinned(torch.from_numpy(np.ascontiguousarray(x))) for name, x in arrays.items()}
        counts = np.array(
            [batch.real_tokens, batch.supervised_tokens, pairs(batch.sample_lengths, self.window)], np.float64
        )
        lengths = None if batch.segments is None else batch.segments.tolist()
        return _Built(tensors, lengths, batch.tokens.shape[1], counts)

    def _placed(self, built: _Built) -> Inputs:
        here = {name: tensor.to(self.device, non_blocking=True) for name, tensor in built.tensors.items()}
        keys, rows, all_keys = here.pop("keys", None), None, None
        if keys is not None and self.layout.sequence_parallel:
            all_keys, keys = keys, keys.chunk(self.layout.tp_size, dim=1)[self.layout.tp_rank]
        if built.lengths is not None:
            rows = packed_rows(built.lengths, here.pop("positions"), here.pop("boundaries"), keys, all_keys)
        elif keys is not None:
            rows = one_sample_a_row(built.width, keys, all_keys)
        top = tuple(here.pop(name) for name in TOP if name in here)
        return Inputs(**here, rows=rows, counts=built.counts, top=top)

    def _keys(self, seed: int, batch: Microbatch, rows: tuple[int, ...]) -> np.ndarray:
        """Return the dropout keys in the order of the layers' tokens: [2, s, b]."""
        keys = token_keys(seed, rows, batch.tokens.shape[1])
        keys = keys.swapaxes(1, 2) if batch.segments is None else keys.reshape(2, -1, 1)
        if self.layout.cp_size > 1:
            keys = own_positions(keys, self.layout, 1)
        return keys


def own_positions(x: np.ndarray, layout: Layout, axis: int) -> np.ndarray:
    """Return this rank's part of the rows under context parallelism: of 2 x CP stretches one from the front and its mirror from the
    back, so that causal attention is the same work for all. As the engine cuts its rotary table.
    """
    stretches = np.split(x, 2 * layout.cp_size, axis=axis)
    return np.concatenate([stretches[layout.cp_rank], stretches[-1 - layout.cp_rank]], axis=axis)
