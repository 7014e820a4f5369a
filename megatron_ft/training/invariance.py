"""Compares a layout with one process: one step in each, every gradient compared by name.

`measure` runs on the ranks of one layout. It uses generated rows with very different loss masks, weights that are a function of their
names (or those of a checkpoint), and one optimizer step with the Stepper of training. Then it gathers all gradients into whole tensors,
by the engine's description of their places. `compare` compares two measurements. Commands and processes are in other modules.
"""

from __future__ import annotations

import dataclasses
import math
import zlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
from megatron.core.dist_checkpointing.dict_utils import nested_values
from megatron.core.dist_checkpointing.mapping import ShardedTensor, ShardedTensorFactory, is_main_replica

from megatron_ft.adapters.new_rows import summing
from megatron_ft.adapters.spec import BASE, TRAINED, Lora
from megatron_ft.checkpoints.folder import MODEL_PREFIX, CheckpointConfig, describe
from megatron_ft.checkpoints.load import load_weights, sharded_weights
from megatron_ft.config.sections import Batch, Data, Kernels, Numerics, Optimizer, Parallelism
from megatron_ft.data.loader import ChatDataset, Choices
from megatron_ft.data.manifest import Manifest
from megatron_ft.data.roles import ASSISTANT, PROMPTER, byte_weights, loss_weights
from megatron_ft.engine.optimizer import make_optimizer, make_schedule
from megatron_ft.engine.parallel import Layout, ParallelSizes, process_groups
from megatron_ft.models.architecture import Architecture
from megatron_ft.models.pipeline import split_beside, split_layers
from megatron_ft.models.trainable import ALL, Trainable
from megatron_ft.training import setup
from megatron_ft.training.objectives.cross_entropy import CrossEntropy
from megatron_ft.training.objectives.objective import Objective
from megatron_ft.training.step import Stepper
from megatron_ft.training.teacher import Teacher

TABLES = ("embedding.word_embeddings.weight", "output_layer.weight")
"""What is padded, in rows."""
ROWS = 8
"""Rows of the one global batch: enough for four data-parallel ranks with two rows at once."""


@dataclass(frozen=True)
class Case:
    """One layout to try."""

    name: str
    processes: int
    parallel: Parallelism = field(default_factory=Parallelism)
    micro_batch_size: int = 1
    packing: bool = True
    kernels: Kernels = field(default_factory=Kernels)
    broken: bool = False
    """Parameters that are whole on each rank under sequence parallelism, and whose gradients are not summed. The comparison must detect
    this."""


@dataclass(frozen=True)
class Problem:
    """The computation of all layouts."""

    architecture: Architecture
    seq_length: int = 64
    numerics: Numerics = field(default_factory=Numerics)
    objective: Objective = field(default_factory=CrossEntropy)
    trainable: Trainable = ALL
    teacher: Architecture | None = None
    """of a resident teacher, with made-up weights of its own"""
    lora: Lora | None = None
    """adapters, which are then all that is trained"""
    checkpoint: str | None = None
    """folder of the weights; None: made up"""
    seed: int = 1234


@dataclass(frozen=True)
class Measured:
    """Set on rank 0 only; None on other ranks."""

    loss: float
    later_loss: float
    """On the same rows, after one update."""
    grad_norm: float
    gradients: dict[str, np.ndarray]
    """Key in a checkpoint -> whole gradient, fp32, of the summed loss divided by the summed weights, without vocabulary padding."""


@dataclass(frozen=True)
class Difference:
    """The difference of a layout from the reference, relative to the size of the compared values."""

    loss: float
    later_loss: float
    grad_norm: float
    gradient: float
    """The largest over all tensors of max |g - g_reference| / max |g_reference|."""
    where: str
    """Name of that tensor."""

    @property
    def largest(self) -> float:
        found = (self.loss, self.later_loss, self.grad_norm, self.gradient)
        return math.inf if any(map(math.isnan, found)) else max(found)


class MadeUpChats:
    """Shards in memory whose rows differ in how much of them is supervised, from nothing to nearly all."""

    prefix = "made-up"

    def __init__(self, vocab: int, seq_length: int, seed: int):
        rng = np.random.default_rng(seed)
        sizes = rng.integers(4, seq_length + 2, 6 * ROWS)
        self.ids = [rng.integers(0, vocab, size) for size in sizes]
        shares = [(number % 5) / 5 for number in range(len(sizes))]
        self._role_bytes = [
            np.where(rng.random(size) < share, ASSISTANT, PROMPTER).astype(np.uint8)
            for size, share in zip(sizes, shares, strict=True)
        ]
        self.lengths = np.asarray(sizes, np.int32)
        self.manifest = Manifest()

    def __len__(self) -> int:
        return len(self.ids)

    def tokens(self, i: int) -> np.ndarray:
        return self.ids[i]

    def role_bytes(self, i: int) -> np.ndarray:
        return self._role_bytes[i]

    def loss_weights(self, by_role: np.ndarray, marked_loss_weight: float = 1.0) -> np.ndarray:
        return byte_weights(by_role)


def measure(problem: Problem, case: Case, prepare: Callable[[list], None] | None = None) -> Measured | None:
    """Measure one case. Every rank of it calls this; only rank 0 gets a result, the others None. prepare: changes the chunks before the
    step.
    """
    arch, parallel, numerics = problem.architecture, case.parallel, problem.numerics
    split = split_layers(arch.num_layers, parallel)
    data = Data(seq_length=problem.seq_length, packing=case.packing, seed=problem.seed)
    with process_groups(ParallelSizes.of(parallel, split.virtual_size), problem.seed) as layout:
        chunks = setup.make_model(
            arch, layout, data, parallel, numerics, case.kernels, trainable=problem.trainable, lora=problem.lora,
            teacher=_teacher(problem, parallel),
        )  # fmt: skip
        bare = setup.bare(chunks)
        section = Optimizer(
            lr=1e-3, lr_decay_style="constant", clip_grad=0.0
        )  # clipping would change the gradients in place
        optimizer = make_optimizer(chunks, section, numerics, parallel.use_distributed_optimizer)
        make_schedule(optimizer, section, Batch(train_iters=10)).step(increment=1)
        if problem.checkpoint:
            folder = Path(problem.checkpoint)
            load_weights(folder, describe(folder), bare, layout, only=BASE)
            make_up_weights(bare, arch, adapters_only=True)
        else:
            make_up_weights(bare, arch)
        if problem.teacher:
            make_up_weights(setup.teachers(chunks), problem.teacher, of="teacher")
        optimizer.reload_model_params()
        if case.broken:
            _forget_norms(bare)
        if prepare:
            prepare(bare)
        rows = MadeUpChats(arch.vocab_size, problem.seq_length, problem.seed)
        dataset = ChatDataset([rows], loss_weights(), Choices(problem.seq_length, problem.seed, packed=case.packing))
        drops = problem.seed if numerics.hidden_dropout or (problem.lora and problem.lora.dropout) else None
        stepper = Stepper(
            chunks, layout, case.micro_batch_size, ROWS, dropout_seed=drops, objective=problem.objective,
            before_reduction=summing(bare, arch.tied_embeddings),
        )  # fmt: skip
        first = stepper.train(dataset, 0, optimizer)
        gradients = _gathered(bare, arch)
        second = stepper.train(dataset, 0, optimizer)
        losses = _from_reporter(layout, [first.loss, second.loss])
    return None if gradients is None else Measured(losses[0], losses[1], first.grad_norm, gradients)


def compare(one: Measured, other: Measured) -> Difference:
    """Compare with the reference `one`. A tensor that only one of the two has differs infinitely."""
    apart = {name: math.inf for name in one.gradients.keys() ^ other.gradients.keys()}
    for name in one.gradients.keys() & other.gradients.keys():
        reference, found = one.gradients[name].astype(np.float64), other.gradients[name].astype(np.float64)
        if reference.shape != found.shape or not np.isfinite(found).all():
            apart[name] = math.inf
        else:
            apart[name] = float(abs(reference - found).max() / max(abs(reference).max(), 1e-12))
    where = max(apart, key=lambda name: apart[name])
    loss, later_loss, grad_norm = (
        abs(getattr(one, name) - getattr(other, name)) / max(abs(getattr(one, name)), 1e-12)
        for name in ("loss", "later_loss", "grad_norm")
    )
    return Difference(loss, later_loss, grad_norm, apart[where], where)


def _parts(
    chunks: list, of: Callable[[Any], torch.Tensor],
    wanted: Callable[[torch.nn.Parameter], bool] = lambda _: True,
) -> Iterator[ShardedTensor]:  # fmt: skip
    """Return the engine's description of the place of every parameter in the whole model, with of(parameter) instead of the parameter."""
    by_id = {id(parameter): parameter for chunk in chunks for parameter in chunk.parameters() if wanted(parameter)}
    for entry in nested_values(sharded_weights(chunks if len(chunks) > 1 else chunks[0])):
        if isinstance(entry, ShardedTensor | ShardedTensorFactory) and id(entry.data) in by_id:
            data = of(by_id[id(entry.data)]).detach()
            if isinstance(entry, ShardedTensor):
                yield dataclasses.replace(entry, data=data, dtype=data.dtype)
            else:
                yield from nested_values(dataclasses.replace(entry, data=data).build())


def _box(part: ShardedTensor) -> tuple[slice, ...]:
    """Return the place of a part in the whole tensor."""
    offset = part.global_offset[part.prepend_axis_num :]
    return tuple(slice(start, start + size) for start, size in zip(offset, part.local_shape, strict=True))


def _teacher(problem: Problem, parallel: Parallelism) -> Teacher | None:
    if problem.teacher is None:
        return None
    arch, ours = problem.teacher, split_layers(problem.architecture.num_layers, parallel)
    described = CheckpointConfig(arch, "torch_dist", 1, 1, arch.vocab_size, "release", "fp32")
    return Teacher(Path(), described, split_beside(ours, problem.architecture.num_layers, arch.num_layers))


def make_up_weights(chunks: list, arch: Architecture, adapters_only: bool = False, of: str = "") -> None:
    """Set weights as a function of their names (and of `of`): the same in every layout. Larger than a usual initialisation, so that
    differences show.
    """
    for part in _parts(chunks, lambda parameter: parameter.data):
        if adapters_only and part.key.removeprefix(MODEL_PREFIX) not in TRAINED:
            continue
        shape = part.global_shape[part.prepend_axis_num :]
        stream = torch.Generator().manual_seed(zlib.crc32((of + part.key).encode()))
        rows = arch.vocab_size if part.key.endswith(TABLES) else shape[0]
        whole = torch.zeros(shape)
        whole[:rows] = torch.randn((rows, *shape[1:]), generator=stream) * (1 / math.sqrt(shape[-1]))
        if len(shape) == 1 and part.key.endswith("weight"):  # a norm's
            whole = 1 + 0.1 * whole
        part.data.copy_(whole[_box(part)].reshape(part.data.shape))


def _gathered(chunks: list, arch: Architecture) -> dict[str, np.ndarray] | None:
    """Return every gradient as a whole tensor on rank 0; None on the others. Copies of a part must be bit-identical, else it is NaN."""
    mine = [
        (part.key, part.global_shape[part.prepend_axis_num :], _box(part), is_main_replica(part.replica_id), part.data)
        for part in _parts(chunks, lambda parameter: parameter.main_grad, lambda parameter: parameter.requires_grad)
    ]
    mine = [(*where, value.float().cpu().clone()) for *where, value in mine]
    held: list = [None] * dist.get_world_size()
    dist.gather_object(mine, held if dist.get_rank() == 0 else None, dst=0)
    if dist.get_rank():
        return None
    whole: dict[str, torch.Tensor] = {}
    everything = sorted((part for of_rank in held for part in of_rank), key=lambda part: not part[3])
    for key, shape, box, is_main, value in everything:  # main copies first
        there = whole.setdefault(key, torch.full(shape, math.nan))[box]
        value = value.reshape(there.shape)
        apart = 0.0 if is_main else float((there - value).abs().max() / there.abs().max().clamp(min=1e-12))
        there.copy_(value if apart < 1e-3 else value * math.nan)
    return {key: (value[: arch.vocab_size] if key.endswith(TABLES) else value).numpy() for key, value in whole.items()}


def _forget_norms(chunks: list) -> None:
    for chunk in chunks:
        for parameter in chunk.parameters():
            if getattr(parameter, "sequence_parallel", False):
                parameter.sequence_parallel = False


def _from_reporter(layout: Layout, values: list[float]) -> list[float]:
    """Return the values of the rank that knows the loss, on all ranks."""
    gathered: list = [None] * dist.get_world_size()
    dist.all_gather_object(gathered, values if layout.is_reporter else None)
    return next(found for found in gathered if found is not None)
