"""LoRA on megatron-core's parallel linears: modules that are added to a built model, before the engine's data-parallel wrapper.

An adapter stands beside the linear in attention or MLP; a hook adds its output to the linear's. Of a column-parallel linear, A is whole on
every rank and B is cut by rows; of a row-parallel one, A is cut by columns and B is whole. What ranks exchange is `rank` numbers a token.
"""

from __future__ import annotations

import functools
import itertools
import zlib
from collections.abc import Callable, Iterator, Sequence
from typing import Any, NamedTuple

import torch
from megatron.core import parallel_state
from megatron.core.tensor_parallel import (
    copy_to_tensor_model_parallel_region,
    gather_from_sequence_parallel_region,
    reduce_from_tensor_model_parallel_region,
    reduce_scatter_to_sequence_parallel_region,
)
from megatron.core.tensor_parallel.layers import set_tensor_model_parallel_attributes
from megatron.core.transformer.utils import make_sharded_tensors_for_checkpoint
from torch import Tensor, nn

from megatron_ft.adapters.new_rows import attach_new_rows, begin_as_frozen, new_rows_in
from megatron_ft.adapters.spec import SUFFIX, Lora, Projection, projections
from megatron_ft.models.architecture import Architecture
from megatron_ft.models.dropout import dropped
from megatron_ft.models.rows import RowParams

_FIRST_PLACE = 1 << 20
"""Numbers of dropout masks: those of residual adds are far below."""


class Pair(nn.Module):
    """The adapter of one projection: A [rank, columns] and B [rows, rank], of which this rank has its part."""

    def __init__(self, projection: Projection, rank: int, config: Any):
        super().__init__()
        tp = config.tensor_model_parallel_size
        self.projection, by_columns = projection, projection.is_row_parallel
        columns = projection.columns // (tp if by_columns else 1)
        rows = projection.rows // (1 if by_columns else tp)
        self.A = nn.Parameter(torch.zeros(rank, columns, dtype=config.params_dtype))
        self.B = nn.Parameter(torch.zeros(rows, rank, dtype=config.params_dtype))
        cut, whole = (self.A, self.B) if by_columns else (self.B, self.A)
        set_tensor_model_parallel_attributes(cut, True, int(by_columns), 1)
        # It is used on this rank's stretch of the sequence only, so its gradients are summed over the tensor-parallel ranks.
        whole.sequence_parallel = config.sequence_parallel  # type: ignore[attr-defined]


class LinearAdapter(nn.Module):
    """The adapters of the projections in one of the engine's linears. q, k and v share a dropout mask, as gate and up do."""

    rows: RowParams | None = None
    """Of the microbatch, for the dropout keys; set before each forward pass of the layer."""

    def __init__(self, lora: Lora, linear: list[Projection], arch: Architecture, config: Any, place: int):
        super().__init__()
        self.scale, self.rank, self.dropout, self.place = lora.scale, lora.rank, lora.dropout, place
        self.is_row_parallel, self.sequence_parallel = linear[0].is_row_parallel, config.sequence_parallel
        self.places = _places(linear, lora, config.tensor_model_parallel_size, arch.head_dim)
        self.names = [one.name for one in linear if one.name in lora.targets]
        for one in linear:
            if one.name in lora.targets:
                self.add_module(one.name, Pair(one, lora.rank, config))

    @property
    def pairs(self) -> list[Any]:
        return [self.get_submodule(name) for name in self.names]

    def forward(self, x: Tensor, output: Tensor) -> Tensor:
        """Return the linear's output with the adapters' added, in the same memory. x: the linear's input, [s, b, columns]."""
        if self.training and self.dropout:
            x = self._dropped(x)
        low = nn.functional.linear(x, _side_by_side([pair.A for pair in self.pairs]))
        return _Added.apply(output, self._exchanged(low), self.scale, self.places, *(pair.B for pair in self.pairs))

    def _exchanged(self, low: Tensor) -> Tensor:
        """Return A x of all ranks: a column-parallel linear needs every token's, a row-parallel one the sum."""
        if self.is_row_parallel:
            together = (
                reduce_scatter_to_sequence_parallel_region
                if self.sequence_parallel
                else reduce_from_tensor_model_parallel_region
            )
            return together(low)
        if self.sequence_parallel:
            return gather_from_sequence_parallel_region(low, tensor_parallel_output_grad=True)
        return copy_to_tensor_model_parallel_region(low)

    def _dropped(self, x: Tensor) -> Tensor:
        """Return x with entries dropped by their token, place and channel. A row-parallel linear has all tokens and some channels."""
        assert self.rows is not None and self.rows.keys is not None, (
            "dropout needs the microbatch's token keys (RowParams)"
        )
        if not self.is_row_parallel:
            return dropped(x, self.rows.keys, self.place, self.dropout)
        keys = self.rows.keys if self.rows.all_keys is None else self.rows.all_keys
        first = x.shape[-1] * parallel_state.get_tensor_model_parallel_rank()
        return dropped(x, keys, self.place, self.dropout, first)

    def sharded_state_dict(self, prefix: str = "", sharded_offsets: tuple = (), metadata: dict | None = None) -> dict:
        """Return the engine's description of the parameters within the whole model."""
        axis = {"A": 1} if self.is_row_parallel else {"B": 0}
        found: dict = {}
        for pair in self.pairs:
            found |= make_sharded_tensors_for_checkpoint(
                {"A": pair.A, "B": pair.B}, f"{prefix}{pair.projection.name}.", axis, sharded_offsets,
                tp_group=parallel_state.get_tensor_model_parallel_group(),
                dp_cp_group=parallel_state.get_data_parallel_group(with_context_parallel=True),
            )  # fmt: skip
        return found


class Places(NamedTuple):
    """Where a rank's rows of a linear have adapters. Rows are those of `groups` query groups, each [q_1..q_n, k, v]; else of one group."""

    groups: int
    rows: int
    """Of a group."""
    of: list[tuple[int, int]]
    """For each adapter, the first row in a group and the one after the last."""


def _places(linear: list[Projection], lora: Lora, tp_size: int, head_dim: int) -> Places:
    cut = 1 if linear[0].is_row_parallel else tp_size
    rows = [one.rows // cut for one in linear]
    groups = rows[1] // head_dim if len(rows) == 3 else 1
    ends = list(itertools.accumulate(size // groups for size in rows))
    starts = [0, *ends[:-1]]
    of = [(start, end) for one, start, end in zip(linear, starts, ends, strict=True) if one.name in lora.targets]
    return Places(groups, ends[-1], of)


def _side_by_side(matrices: list[Tensor]) -> Tensor:
    return matrices[0] if len(matrices) == 1 else torch.cat(matrices)


class _Added(torch.autograd.Function):
    """output + scale * B low, for all adapters of a linear in one product with their B in one matrix, zero elsewhere.

    low [s, b, ranks]: of each adapter after the other. The sum is written into `output`, which no backward pass reads: nothing of the
    output's size is allocated, in either pass. The matrix is made again in the backward pass.
    """

    @staticmethod
    def forward(ctx: Any, output: Tensor, low: Tensor, scale: float, places: Places, *each: Tensor) -> Tensor:
        ctx.save_for_backward(low, *each)
        ctx.scale, ctx.places = scale, places
        flat = output.data.view(-1, output.shape[-1])
        flat.addmm_(low.reshape(-1, low.shape[-1]), _in_place(each, places).t(), alpha=scale)
        return flat.view(output.shape)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> Any:
        low, *each = ctx.saved_tensors
        flat = gradient.reshape(-1, gradient.shape[-1])
        below = flat.mm(_in_place(each, ctx.places)).mul_(ctx.scale).view(low.shape)
        matrix = flat.t().mm(low.reshape(-1, low.shape[-1])).mul_(ctx.scale)
        return gradient, below, None, None, *_out_of_place(matrix, ctx.places)


def _in_place(each: Sequence[Tensor], places: Places) -> Tensor:
    """Return the adapters' B as one matrix, [rows of the linear, ranks]."""
    rank = each[0].shape[1]
    if len(each) == 1 and places.of[0] == (0, places.rows):
        return each[0]
    matrix = each[0].new_zeros(places.groups, places.rows, rank * len(each))
    for number, ((start, end), B) in enumerate(zip(places.of, each, strict=True)):
        matrix[:, start:end, number * rank : (number + 1) * rank] = B.view(places.groups, -1, rank)
    return matrix.view(-1, matrix.shape[-1])


def _out_of_place(matrix: Tensor, places: Places) -> list[Tensor]:
    """Return each adapter's part of a matrix as _in_place makes it."""
    parts = matrix.view(places.groups, places.rows, len(places.of), -1)
    return [parts[:, start:end, number].flatten(0, 1) for number, (start, end) in enumerate(places.of)]


def attach(chunks: list, arch: Architecture, lora: Lora) -> None:
    """Add the adapters to the chunks of a stage. Their weights are zero: see `initialise`."""
    by_linear: dict[str, list[Projection]] = {}
    for one in projections(arch):
        by_linear.setdefault(one.linear, []).append(one)
    for chunk in chunks:
        for layer in chunk.decoder.layers:
            made = {
                path: LinearAdapter(lora, linear, arch, chunk.config, _FIRST_PLACE + 4 * layer.layer_number + number)
                for number, (path, linear) in enumerate(by_linear.items())
                if any(one.name in lora.targets for one in linear)
            }
            for path, adapter in made.items():
                _attach(layer, path, adapter)
            if lora.dropout:
                _hand_on_rows(layer, list(made.values()))
    if lora.new_tokens:
        attach_new_rows(chunks, lora.new_tokens, arch.tied_embeddings)


def _attach(layer: Any, path: str, adapter: LinearAdapter) -> None:
    linear = layer.get_submodule(path)
    parent, _, name = path.rpartition(".")
    layer.get_submodule(parent).add_module(name + SUFFIX, adapter.to(linear.weight.device))
    linear.register_forward_hook(lambda _, args, output: (adapter(args[0], output[0]), *output[1:]))


def _hand_on_rows(layer: Any, adapters: list[LinearAdapter]) -> None:
    """Give the adapters the dropout keys of the microbatch that the layer computes."""

    def give(rows: Any) -> None:
        for adapter in adapters:
            adapter.rows = rows

    def before(_: Any, args: Any, options: dict) -> None:
        rows = options.get("packed_seq_params")
        give(rows)
        if layer.training and layer.recompute_mlp:
            # The MLP runs again in the backward pass, after the forward passes of later microbatches.
            layer.__dict__["mlp"] = _Bound(functools.partial(_run, give, rows, layer._modules["mlp"]))

    def after(*_: Any) -> None:
        layer.__dict__.pop("mlp", None)

    layer.register_forward_pre_hook(before, with_kwargs=True)
    layer.register_forward_hook(after, always_call=True)


class _Bound(nn.Module):
    """A function as a module, which megatron-core 0.19 asks for."""

    def __init__(self, run: Callable[..., Any]):
        super().__init__()
        self.run = run

    def forward(self, *args: Any, **options: Any) -> Any:
        return self.run(*args, **options)


def _run(give: Callable[[Any], None], rows: Any, mlp: Any, *args: Any, **options: Any) -> Any:
    give(rows)
    return mlp(*args, **options)


def adapters_in(chunks: list) -> Iterator[tuple[int, Pair]]:
    """Yield (layer from 0, pair) of every adapter of a stage."""
    for chunk in chunks:
        for layer in chunk.decoder.layers:
            for module in layer.modules():
                if isinstance(module, Pair):
                    yield layer.layer_number - 1, module


@torch.no_grad()
def fill_adapters(chunks: list, whole: Callable[[str], Tensor], tp_size: int, tp_rank: int) -> None:
    """Fill every adapter of a stage, and the rows of new tokens.

    whole: name of a parameter in a checkpoint -> the whole matrix, of which this rank keeps its part.
    """
    for layer, pair in adapters_in(chunks):
        for part, parameter in (("A", pair.A), ("B", pair.B)):
            matrix = whole(pair.projection.key(layer, part))
            if getattr(parameter, "tensor_model_parallel", False):
                matrix = matrix.chunk(tp_size, dim=int(part == "A"))[tp_rank]
            parameter.copy_(matrix)
    for _, rows in new_rows_in(chunks):
        rows.rows.copy_(whole(rows.key))


def initial(name: str, shape: tuple[int, int], seed: int) -> Tensor:
    """Return the initial weights of a parameter, the same in every layout: A uniform within 1 / sqrt(columns), B zero, as in PEFT."""
    if name.endswith(".B"):
        return torch.zeros(shape)
    stream = torch.Generator().manual_seed(zlib.crc32(f"{seed} {name}".encode()))
    bound = shape[1] ** -0.5
    return torch.rand(shape, generator=stream) * (2 * bound) - bound


@torch.no_grad()
def initialise(chunks: list, arch: Architecture, lora: Lora, seed: int, tp_size: int, tp_rank: int) -> None:
    """Set the initial weights of new adapters; rows of new tokens begin as those of the base, which is loaded."""
    shapes = {name: shape for name, shape in lora.shapes(arch).items() if not name.endswith(".rows")}
    frozen = {rows.key: rows.rows for _, rows in new_rows_in(chunks)}
    begin_as_frozen(chunks)

    def whole(name: str) -> Tensor:
        return frozen[name] if name in frozen else initial(name, shapes[name], seed)

    fill_adapters(chunks, whole, tp_size, tp_rank)
