"""One optimizer step and one evaluation, the same for every layout: the engine's schedule decides who sends what to whom."""

from __future__ import annotations

import contextlib
import itertools
import time
from collections.abc import Iterator
from dataclasses import dataclass, field
from functools import partial

import torch
from megatron.core import parallel_state
from megatron.core.pipeline_parallel import get_forward_backward_func

from megatron_ft import device
from megatron_ft.data.loader import ChatDataset, Microbatch, step_rows
from megatron_ft.models.dropout import RowParams, token_keys
from megatron_ft.parallel import Layout
from megatron_ft.training.loss import GlobalWeight, breakdown, weighted_sum
from megatron_ft.training.throughput import pairs
from megatron_ft.training.update import Update, update


@dataclass(frozen=True)
class StepResult:
    """What one step came to, summed over the whole global batch. Meaningful on ranks of the last pipeline stage."""

    loss: float
    """Weighted mean over the global batch (nats per token)."""
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
    breakdown: dict[str, float] = field(default_factory=dict)
    """Mean loss by role, source and position, all tokens counted alike: {"loss_by_role/assistant": 1.2, ...}."""


_Batch = tuple[Microbatch, list[int]]
"""A microbatch, and the running numbers of its rows."""


class Phases(dict):
    """Seconds of each phase of a step, on the host's clock. `exact` waits for the device at the end of each."""

    def __init__(self, exact: bool):
        super().__init__()
        self.exact = exact

    @contextlib.contextmanager
    def __call__(self, name: str):
        start = time.perf_counter()
        yield
        if self.exact:
            device.synchronize()
        self[name] = self.get(name, 0.0) + time.perf_counter() - start


class Stepper:
    """Runs steps of one model over one dataset. Keeps nothing between steps but the engine's own state.

    model: the chunks of this rank's stage (setup.make_model). dropout_seed: of the residual dropout's masks; None: no dropout.
    """

    def __init__(
        self, model: list, layout: Layout, micro_batch_size: int, global_batch_size: int, exact_phases: bool = False,
        dropout_seed: int | None = None,
    ):  # fmt: skip
        self.model, self.layout, self.dropout_seed = model, layout, dropout_seed
        self.micro_batch_size, self.global_batch_size = micro_batch_size, global_batch_size
        self.weight = GlobalWeight()
        self.device = device.current_device()
        self.phases = Phases(exact_phases)
        size = model[0].config.window_size
        self.window = None if size is None else size[0] + 1
        model[0].config.finalize_model_grads_func = self.weight.finalize

    def train(self, dataset: ChatDataset, consumed: int, optimizer) -> StepResult:
        """Forward, backward, update on the rows that follow `consumed`."""
        for chunk in self.model:
            chunk.train()
            chunk.zero_grad_buffer()
        optimizer.zero_grad()
        if self.model[0].config.fp16:
            self.model[0].config.grad_scale_func = optimizer.scale_loss
        self.phases.clear()
        with self.phases("forward_backward"):
            sums = self._run(dataset, consumed, forward_only=False)
        with self.phases("optimizer"):
            empty = not float(self.weight.total)  # by now summed over all ranks
            done = Update(False, 0.0) if empty else update(optimizer)
        return self._result(
            dataset, sums, grad_norm=done.grad_norm, skipped=not done.updated, overflow=done.overflow, empty=empty,
            loss_scale=done.loss_scale,
        )  # fmt: skip

    def settle(self) -> None:
        """Make this rank's weights those of after the last update, for whoever reads them outside a forward pass.

        With --overlap_param_gather they would else come with the next one.
        """
        for chunk in self.model:
            if chunk.ddp_config.overlap_param_gather:
                chunk.start_param_sync(force_sync=True)

    @torch.no_grad()
    def evaluate(self, dataset: ChatDataset, iters: int) -> StepResult:
        """Weighted mean loss over the first `iters` global batches of `dataset`, dropout off. No row counts twice: what the
        last batch has beyond the first epoch is empty.
        """
        for chunk in self.model:
            chunk.eval()
        rows = len(dataset.epoch_rows(0))
        batches = min(iters, -(-rows // self.global_batch_size))
        sums = sum(self._run(dataset, i * self.global_batch_size, forward_only=True, end=rows) for i in range(batches))
        for chunk in self.model:
            chunk.train()
        return self._result(dataset, sums)

    def _run(self, dataset: ChatDataset, consumed: int, forward_only: bool, end: int | None = None) -> torch.Tensor:
        """[tokens, supervised tokens, pairs that see each other, then what weighted_sum logs] of this rank's share of one global
        batch; rows from `end` on are empty.
        """
        mine = step_rows(
            consumed, self.global_batch_size, self.micro_batch_size, self.layout.dp_rank, self.layout.dp_size
        )
        sizes = [len(names) for names in dataset.group_names.values()]
        counts = torch.zeros(3, dtype=torch.float64)
        self.weight.start_step(self.device)
        batches = itertools.tee(self._batches(dataset, mine, end), len(self.model))  # every chunk sees every microbatch
        logs = get_forward_backward_func()(
            forward_step_func=partial(self._forward, counts=counts, sizes=sizes),
            data_iterator=list(batches) if len(self.model) > 1 else batches[0],
            model=self.model,
            num_microbatches=len(mine),
            **self._shape(dataset),
            forward_only=forward_only,
        )
        losses = torch.stack(logs).sum(0).cpu() if logs else torch.zeros(2 + 2 * sum(sizes), dtype=torch.float64)
        return torch.cat([counts, losses])

    def _batches(self, dataset: ChatDataset, rows_of: list[list[int]], end: int | None) -> Iterator[_Batch]:
        for rows in rows_of:
            with self.phases("data"):
                batch = dataset.microbatch(rows, end)
            yield batch, rows

    def _forward(self, batches: Iterator[_Batch], model, counts: torch.Tensor, sizes: list[int]):
        """The engine's forward step: one microbatch through one chunk of this rank's stage."""
        batch, rows = next(batches)
        weights, groups = (self._here(x) for x in (batch.weights, batch.groups))
        tokens, labels = self._here(batch.tokens), self._here(batch.labels)
        if self.layout.cp_size > 1:
            tokens, labels, weights, groups = (self._own_positions(x, -1) for x in (tokens, labels, weights, groups))
        if model is self.model[0]:  # what is counted is counted by a stage's first chunk
            seen = pairs(batch.sample_lengths, self.window)
            if self.layout.cp_rank == 0:  # the others have the same rows
                counts += torch.tensor([batch.real_tokens, batch.supervised_tokens, seen], dtype=torch.float64)
            self.weight.add(weights)
        if batch.segments is not None:  # the rows of a packed batch are one long row
            tokens, labels, weights, groups = (x.flatten(-2).unsqueeze(-2) for x in (tokens, labels, weights, groups))
        described = self._describe(batch, rows, dropping=model.training)
        losses = model(tokens, _position_ids(tokens), None, labels=labels, packed_seq_params=described)
        return losses, partial(weighted_sum, weights=weights, groups=groups, sizes=sizes)

    def _describe(self, batch: Microbatch, rows: list[int], dropping: bool) -> RowParams | None:
        """What layers need to know of a microbatch beside its activations; None: nothing."""
        drops = dropping and self.dropout_seed is not None
        keys = self._keys(batch, rows) if drops else None
        if batch.segments is not None:
            return packed_params(batch.segments, self.device, keys)
        length = batch.tokens.shape[1]
        return RowParams("sbhd", max_seqlen_q=length, max_seqlen_kv=length, keys=keys) if drops else None

    def _keys(self, batch: Microbatch, rows: list[int]) -> torch.Tensor:
        """The microbatch's dropout keys as the layers see its tokens: [2, s, b], this rank's stretch under sequence parallelism."""
        keys = self._here(token_keys(self.dropout_seed, rows, batch.tokens.shape[1]))
        keys = keys.transpose(1, 2) if batch.segments is None else keys.flatten(1)[..., None]
        if self.layout.cp_size > 1:
            keys = self._own_positions(keys, 1)
        if self.layout.sequence_parallel:
            keys = keys.chunk(self.layout.tp_size, dim=1)[self.layout.tp_rank]
        return keys.contiguous()

    def _own_positions(self, x: torch.Tensor, dim: int) -> torch.Tensor:
        """This rank's part of the rows under context parallelism: of 2 x CP stretches one from the front and its mirror from the
        back, so that causal attention is the same work for all. As the engine cuts its rotary table.
        """
        stretches = x.chunk(2 * self.layout.cp_size, dim=dim)
        return torch.cat([stretches[self.layout.cp_rank], stretches[-1 - self.layout.cp_rank]], dim=dim)

    def _here(self, array) -> torch.Tensor:
        return torch.from_numpy(array).to(self.device, non_blocking=True)

    def _shape(self, dataset: ChatDataset) -> dict:
        """What passes between pipeline stages: [s, b, h]; a packed batch is one row of b * s."""
        if dataset.packed:
            return {"seq_length": dataset.seq_length * self.micro_batch_size, "micro_batch_size": 1}
        return {"seq_length": dataset.seq_length, "micro_batch_size": self.micro_batch_size}

    def _result(self, dataset: ChatDataset, sums: torch.Tensor, **more) -> StepResult:
        sums = sums.to(self.device)
        torch.distributed.all_reduce(sums, group=parallel_state.get_data_parallel_group(with_context_parallel=True))
        tokens, supervised, seen, loss, weight, *rest = sums.tolist()
        groups = breakdown(rest, dataset.group_names)
        counted = {"tokens": int(tokens), "supervised_tokens": int(supervised), "seen": seen}
        return StepResult(loss / max(weight, 1e-12), breakdown=groups, **counted, **more)


def packed_params(segments, device: torch.device, keys: torch.Tensor | None = None) -> RowParams:
    """Sample lengths [k] -> the engine's description of a packed row. The longest length bounds the rotary table."""
    lengths = torch.as_tensor(segments, dtype=torch.int32)
    boundaries = torch.nn.functional.pad(lengths.cumsum(0, dtype=torch.int32), (1, 0)).to(device)
    longest = int(lengths.max())
    return RowParams(
        qkv_format="thd", cu_seqlens_q=boundaries, cu_seqlens_kv=boundaries, max_seqlen_q=longest, max_seqlen_kv=longest, keys=keys
    )  # fmt: skip


def _position_ids(tokens: torch.Tensor) -> torch.Tensor:
    """[b, s]; the rotary embedding counts for itself, but the engine's embedding asks for them."""
    return torch.arange(tokens.shape[1], device=tokens.device).expand_as(tokens)
