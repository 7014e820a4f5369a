"""One optimizer step and one evaluation, the same for every layout: the engine's schedule communicates between stages."""

from __future__ import annotations

import contextlib
import itertools
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from functools import partial, reduce
from typing import Any

import numpy as np
import torch
from megatron.core import parallel_state
from megatron.core.pipeline_parallel import get_forward_backward_func

from megatron_ft import device
from megatron_ft.data.loader import ChatDataset, step_rows
from megatron_ft.engine.exchange import known_shapes
from megatron_ft.engine.parallel import Layout
from megatron_ft.models.sparsity import ZeroCounts
from megatron_ft.training.global_weight import GlobalWeight
from megatron_ft.training.inputs import Inputs, InputStream
from megatron_ft.training.objectives.cross_entropy import CrossEntropy
from megatron_ft.training.objectives.objective import Objective
from megatron_ft.training.update import Update, update


@dataclass(frozen=True)
class StepResult:
    """The result of one step, summed over the whole global batch. Meaningful on ranks of the last pipeline stage."""

    loss: float
    """The objective's mean over the global batch; cross-entropy: nats per token."""
    tokens: int
    supervised_tokens: int
    grad_norm: float = 0.0
    """Before clipping."""
    skipped: bool = False
    """Nothing was updated."""
    overflow: bool = False
    """Skipped because gradients overflowed fp16 while the dynamic loss scale can still fall."""
    seen: float = 0.0
    """Pairs of tokens of which one sees the other (throughput.pairs), within the model's window."""
    empty: bool = False
    """Skipped because no token of the global batch had a weight."""
    loss_scale: float = 1.0
    """By which the loss was multiplied (fp16)."""
    more: dict[str, float] = field(default_factory=dict)
    """Other values that the objective logs; cross-entropy: mean loss by role, source and position, {"loss_by_role/assistant": 1.2, ...}.
    With `zeros` also the shares of zeros in the MLPs."""


class Phases(dict):
    """Seconds of each phase of a step, on the host's clock. `exact` waits for the device at the end of each."""

    def __init__(self, exact: bool):
        super().__init__()
        self.exact = exact

    @contextlib.contextmanager
    def __call__(self, name: str) -> Iterator[None]:
        start = time.perf_counter()
        yield
        if self.exact:
            device.synchronize()
        self[name] = self.get(name, 0.0) + time.perf_counter() - start


class Stepper:
    """Runs steps of one model over one dataset. Keeps nothing between steps but the engine's own state.

    model: the chunks of this rank's stage (setup.make_model). dropout_seed: of the residual dropout's masks; None: no dropout.
    objective: what is minimised; None: cross-entropy. before_reduction: called each step before gradients are reduced over the ranks.
    zeros: counts those in the MLPs; None: they are not counted.
    """

    def __init__(
        self, model: list, layout: Layout, micro_batch_size: int, global_batch_size: int, exact_phases: bool = False,
        dropout_seed: int | None = None, objective: Objective | None = None,
        before_reduction: Callable[[], None] | None = None, zeros: ZeroCounts | None = None,
    ):  # fmt: skip
        self.model, self.layout = model, layout
        self.objective = objective or CrossEntropy()
        self.zeros = zeros
        self.micro_batch_size, self.global_batch_size = micro_batch_size, global_batch_size
        self.weight = GlobalWeight(before_reduction)
        self.device = device.current_device()
        self.phases = Phases(exact_phases)
        size = model[0].config.window_size
        self.inputs = InputStream(layout, dropout_seed, None if size is None else size[0] + 1)
        model[0].config.finalize_model_grads_func = self.weight.finalize

    def train(self, dataset: ChatDataset, consumed: int, optimizer: Any, last: bool = False) -> StepResult:
        """Forward, backward, update on the rows that follow `consumed`. last: no step follows, so that no rows are built for it."""
        for chunk in self.model:
            chunk.train()
            chunk.zero_grad_buffer()
        optimizer.zero_grad()
        if self.model[0].config.fp16:
            self.model[0].config.grad_scale_func = optimizer.scale_loss
        self.phases.clear()
        self._count_anew()
        with self.phases("forward_backward"):
            sums = self._run(dataset, consumed, forward_only=False, last=last)
        with self.phases("optimizer"):
            empty = not float(self.weight.total)  # by now summed over all ranks
            done = Update(False, 0.0) if empty else update(optimizer)
        return self._result(
            dataset, sums, grad_norm=done.grad_norm, skipped=not done.updated, overflow=done.overflow, empty=empty,
            loss_scale=done.loss_scale,
        )  # fmt: skip

    def settle(self) -> None:
        """Update this rank's weights to those after the last step, before they are read outside a forward pass.

        With --overlap_param_gather they would else come with the next one.
        """
        for chunk in self.model:
            if chunk.ddp_config.overlap_param_gather:
                chunk.start_param_sync(force_sync=True)

    @torch.no_grad()
    def evaluate(self, dataset: ChatDataset, iters: int) -> StepResult:
        """Return the weighted mean loss over the first `iters` global batches of `dataset`, with dropout off. Each row counts once: in the
        last batch, rows beyond the first epoch are empty.
        """
        for chunk in self.model:
            chunk.eval()
        self._count_anew()
        rows = len(dataset.epoch_rows(0))
        batches = min(iters, -(-rows // self.global_batch_size))
        shares = (
            self._run(dataset, i * self.global_batch_size, forward_only=True, end=rows, last=i == batches - 1)
            for i in range(batches)
        )
        sums = reduce(torch.add, shares)
        for chunk in self.model:
            chunk.train()
        return self._result(dataset, sums)

    def _run(
        self, dataset: ChatDataset, consumed: int, forward_only: bool, end: int | None = None, last: bool = False
    ) -> torch.Tensor:  # fmt: skip
        """Return [tokens, supervised tokens, pairs that see each other, then what the objective logs], fp64 on the device, of this
        rank's share of one global batch; rows from `end` on are empty.
        """
        mine, following = (
            step_rows(first, self.global_batch_size, self.micro_batch_size, self.layout.dp_rank, self.layout.dp_size)
            for first in (consumed, consumed + self.global_batch_size)
        )
        counts = np.zeros(3)
        self.weight.start_step(self.device)
        inputs = self.inputs.step(
            dataset,
            mine,
            end,
            dropping=not forward_only,
            waiting=partial(self.phases, "data"),
            then=() if last else following,
        )
        batches = itertools.tee(inputs, len(self.model))  # every chunk sees every microbatch
        logs = get_forward_backward_func()(
            forward_step_func=partial(self._forward, counts=counts, dataset=dataset),
            data_iterator=list(batches) if len(self.model) > 1 else batches[0],
            model=self.model,
            num_microbatches=len(mine),
            **self._shape(dataset),
            **self._exchange(dataset, mine, end),
            forward_only=forward_only,
        )
        counted = device.handed(torch.from_numpy(counts))
        unknown = torch.zeros(self.objective.log_size(dataset), dtype=torch.float64, device=self.device)
        return torch.cat([counted, torch.stack(logs).sum(0) if logs else unknown])

    def _forward(
        self, batches: Iterator[Inputs], model: Any, counts: np.ndarray, dataset: ChatDataset
    ) -> tuple[torch.Tensor, Callable]:
        """Run the engine's forward step: one microbatch through one chunk of this rank's stage."""
        batch = next(batches)
        if model is self.model[0]:  # the first chunk of a stage counts
            if self.layout.cp_rank == 0:  # the others have the same rows
                counts += batch.counts
            self.weight.add(self.objective.weight(batch))
        with self.zeros.counting(batch.groups[0] >= 0) if self.zeros else contextlib.nullcontext():
            output = self.objective.forward(model, batch)
        return output, partial(self.objective.contribution, batch=batch, dataset=dataset)

    def _count_anew(self) -> None:
        if self.zeros:
            self.zeros.start()

    def _shape(self, dataset: ChatDataset) -> dict:
        """Return the shape of what passes between pipeline stages, [s, b, h]; a packed batch is one row of b * s."""
        if dataset.packed:
            return {"seq_length": dataset.seq_length * self.micro_batch_size, "micro_batch_size": 1}
        return {"seq_length": dataset.seq_length, "micro_batch_size": self.micro_batch_size}

    def _exchange(self, dataset: ChatDataset, rows_of: list[list[int]], end: int | None) -> dict:
        """Return how stages exchange microbatches of different lengths; {}: they do not differ, or there is one stage."""
        config = self.model[0].config
        if not (config.variable_seq_lengths and self.layout.pp_size > 1):
            return {}
        cut = self.layout.tp_size if self.layout.sequence_parallel else 1
        lengths = [dataset.width(rows, end) for rows in rows_of]
        return known_shapes(config, [(s // cut, self.micro_batch_size, config.hidden_size) for s in lengths])

    def _result(self, dataset: ChatDataset, sums: torch.Tensor, **more: Any) -> StepResult:
        torch.distributed.all_reduce(sums, group=parallel_state.get_data_parallel_group(with_context_parallel=True))
        tokens, supervised, seen, *log = sums.tolist()
        loss, others = self.objective.read(log, dataset)
        if self.zeros:
            others = {**others, **self.zeros.shares().metrics()}
        counted = {"tokens": int(tokens), "supervised_tokens": int(supervised), "seen": seen}
        return StepResult(loss, more=others, **counted, **more)
