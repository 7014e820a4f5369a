"""The engine's linears over NF4: a rank holds the codes and scales of its slice and dequantises them in each product.

The forward pass and its communication are the engine's own; only the matrix product is replaced. Nothing but codes and scales is kept for
the backward pass, which dequantises again and computes the gradient of the input; the weight has none. With the same arithmetic the
result is that of a plain linear with the dequantised weight, bit for bit.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import torch
from megatron.core import tensor_parallel
from megatron.core.tensor_parallel import ColumnParallelLinear, RowParallelLinear
from megatron.core.transformer.mlp import apply_swiglu_sharded_factory
from megatron.core.transformer.utils import make_sharded_tensors_for_checkpoint
from torch import Tensor
from torch.nn import Module, Parameter

from megatron_ft.errors import ConfigError
from megatron_ft.quantization import nf4
from megatron_ft.quantization.kernels import dequantiser
from megatron_ft.quantization.nf4 import Dequantise, Nf4
from megatron_ft.quantization.sizes import BLOCK


class FrozenLinear(Module):
    """What both kinds of frozen linear share. `weight` holds the codes [out, in/2], `weight_absmax` the scales [out, in/64]."""

    weight: Parameter
    weight_absmax: Parameter
    bias: Parameter | None
    config: Any
    cut: int
    """The axis that tensor parallelism cuts."""
    rounded: torch.dtype = torch.float32
    """The type of the dequantised weight, whatever type a product is computed in: that of the model that was quantised."""

    def __init__(self, *args: Any, **options: Any) -> None:
        super().__init__(*args, **options)
        out, columns = self.weight.shape
        check_columns(columns, type(self).__name__)
        codes = self.weight.new_zeros((out, columns // 2), dtype=torch.uint8)
        self.hold(Nf4(codes, self.weight.new_zeros((out, columns // BLOCK), dtype=torch.float32)))

    def hold(self, quantised: Nf4) -> None:
        """Replace the weight by codes and scales; the bias is frozen too."""
        before = self.weight
        self.weight = Parameter(quantised.codes, requires_grad=False)
        self.weight_absmax = Parameter(quantised.absmax, requires_grad=False)
        for held in (self.weight, self.weight_absmax):
            tensor_parallel.copy_tensor_model_parallel_attributes(held, before)
        if self.bias is not None:
            self.bias.requires_grad_(False)

    def dense(self, codes: Tensor, absmax: Tensor, dtype: torch.dtype) -> Tensor:
        """Return this rank's slice of the weight [out, in] in the type of a product."""
        return dequantiser()(codes, absmax, self.rounded).to(dtype)

    def _forward_impl(
        self, input: Tensor, weight: Tensor, bias: Tensor | None, allreduce_dgrad: bool, sequence_parallel: bool,
        tp_group: Any = None, **_: Any,
    ) -> Tensor:  # fmt: skip
        """Multiply, where the engine's forward does. input: [s, b, in], with sequence parallelism this rank's part of s."""
        if sequence_parallel:
            input = tensor_parallel.gather_from_sequence_parallel_region(
                input, tensor_parallel_output_grad=True, group=tp_group
            )
        elif allreduce_dgrad:
            input = tensor_parallel.copy_to_tensor_model_parallel_region(input, group=tp_group)
        output = _Product.apply(input, weight, self.weight_absmax, self.dense)
        return output if bias is None else output + bias

    def _apply(self, fn: Callable, recurse: bool = True) -> Any:
        """Move or convert, but keep the scales in fp32: the engine's wrapper makes all numbers of a model bf16."""
        exact = self.weight_absmax.data
        super()._apply(fn, recurse)
        self.weight_absmax.data = exact.to(self.weight.device)
        return self

    def sharded_state_dict(self, prefix: str = "", sharded_offsets: tuple = (), metadata: dict | None = None) -> dict:
        """Describe codes and scales in the whole model, cut as the weight would be."""
        axes = {"weight": self.cut, "weight_absmax": self.cut} | ({"bias": 0} if self.cut == 0 else {})
        groups = {"tp_group": self.tp_group, "dp_cp_group": (metadata or {})["dp_cp_group"]}
        state = self.state_dict(prefix="", keep_vars=True)
        described = make_sharded_tensors_for_checkpoint(state, prefix, axes, sharded_offsets, **groups)
        if prefix.endswith("linear_fc1.") and self.config.gated_linear_unit:  # the engine does so for the weight
            name = f"{prefix}weight_absmax"
            described[name] = apply_swiglu_sharded_factory(described[name], sharded_offsets)
        return described


class FrozenColumnParallelLinear(FrozenLinear, ColumnParallelLinear):
    """ColumnParallelLinear over NF4: rows are cut."""

    cut = 0


class FrozenRowParallelLinear(FrozenLinear, RowParallelLinear):
    """RowParallelLinear over NF4: columns are cut, in whole blocks."""

    cut = 1


FROZEN: dict[type, type[FrozenLinear]] = {
    ColumnParallelLinear: FrozenColumnParallelLinear,
    RowParallelLinear: FrozenRowParallelLinear,
}


def freeze_linears(chunk: Any, rounded: torch.dtype | None = None) -> int:
    """Quantise the linears of all layers of a bare chunk where they are; return their number. Embedding and output layer stay.

    The weights must be loaded; the slices of all ranks are then those of the quantised whole. rounded: the type of the checkpoint, if the
    model computes in another; then the result is that of a checkpoint made with --quantize nf4.
    Raise ConfigError where the slice of a rank is not made of whole blocks.
    """
    found = [(name, module) for name, module in chunk.decoder.named_modules() if type(module) in FROZEN]
    for name, module in found:
        check_columns(module.weight.shape[1], name)
        quantised = nf4.quantise(module.weight, name)
        kind, module.__class__ = rounded or module.weight.dtype, FROZEN[type(module)]
        module.hold(quantised)
        module.rounded = kind
    return len(found)


def plan_frozen(layer: Any) -> None:
    """Change the engine's specification of a layer, so that its linears hold codes from the start, without room for plain weights."""
    attention, within = layer.submodules.self_attention.submodules, mlp_submodules(layer)
    attention.linear_qkv, attention.linear_proj = FrozenColumnParallelLinear, FrozenRowParallelLinear
    within.linear_fc1, within.linear_fc2 = FrozenColumnParallelLinear, FrozenRowParallelLinear


def mlp_submodules(layer: Any) -> Any:
    """Return the parts of the MLP in the engine's specification of a layer."""
    mlp = layer.submodules.mlp
    return mlp.submodules if hasattr(mlp, "submodules") else mlp.keywords["submodules"]  # a partial since 0.19


def frozen_linears(chunk: Module) -> dict[str, FrozenLinear]:
    """Return name -> module of the linears of a chunk that hold NF4."""
    return {name: module for name, module in chunk.named_modules() if isinstance(module, FrozenLinear)}


def parameters(chunk: Module) -> int:
    """Return the number of parameters of a chunk, that of a frozen linear as those of its weight: a byte is two codes."""
    held = sum(parameter.numel() for parameter in chunk.parameters())
    return held + sum(linear.weight.numel() - linear.weight_absmax.numel() for linear in frozen_linears(chunk).values())


def check_columns(columns: int, name: str) -> None:
    if columns % BLOCK:
        raise ConfigError(
            f"{name}: a rank's {columns} columns are no multiple of NF4's block of {BLOCK}: use a smaller "
            f"--tensor_model_parallel_size, or the model without quantisation"
        )


class _Product(torch.autograd.Function):
    """input [..., in] x weight [out, in]^T; the weight is made again in the backward pass."""

    @staticmethod
    def forward(ctx: Any, input: Tensor, codes: Tensor, absmax: Tensor, dense: Dequantise) -> Tensor:
        ctx.save_for_backward(codes, absmax)
        ctx.dense = dense
        return _multiply(input, dense(codes, absmax, input.dtype).t())

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> Any:
        codes, absmax = ctx.saved_tensors
        return _multiply(gradient, ctx.dense(codes, absmax, gradient.dtype)), None, None, None


def _multiply(left: Tensor, right: Tensor) -> Tensor:
    """Return the product, in fp32 where a CPU computes its type much more slowly."""
    if left.device.type == "cpu" and not _has_units(left.dtype):
        return torch.matmul(left.float(), right.float()).to(left.dtype)
    return torch.matmul(left, right)


@functools.cache
def _has_units(dtype: torch.dtype) -> bool:
    """Return whether this CPU has units for products of a type. Without them bf16 took 7 times as long as fp32 on one machine."""
    asked = {
        torch.bfloat16: ("_is_avx512_bf16_supported", "_is_amx_tile_supported"),
        torch.float16: ("_is_amx_fp16_supported",),
    }
    return dtype not in asked or any(getattr(torch.cpu, name, bool)() for name in asked[dtype])
