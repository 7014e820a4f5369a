"""Chooses the kernels for attention, norms, activations, the loss and the update on this machine. No other module chooses them.

Two choices of kernel give the same result up to rounding. No kernel is required: without a GPU or the optional packages torch's own
operations are used. `doctor` prints the choice, training logs it once. Models are in other modules; torch is not imported here.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from megatron_ft.config.sections import Kernels, Numerics, Parallelism
from megatron_ft.errors import ConfigError
from megatron_ft.models.machine import FLASH_CAPABILITY, Machine, dotted, machine, varlen_arguments

if TYPE_CHECKING:
    from torch import Tensor

__all__ = ["Attention", "Choice", "Machine", "check_context_parallel", "choose", "machine", "varlen_attention"]


@dataclass(frozen=True)
class Attention:
    """Requirements of a model on an attention kernel."""

    grouped: bool = True
    """fewer key-value heads than query heads"""
    window: bool = False
    scaled: bool = False
    """scores are scaled by something else than 1 / sqrt(head size)"""


@dataclass(frozen=True)
class Choice:
    """The chosen kernels."""

    packed_attention: str
    """flash-attn, torch-varlen, or by-sample (scaled_dot_product_attention, once per sample)."""
    fused: bool
    """Activation, loss, rotary embedding and residual dropout as compiled kernels, each one pass over its data."""
    optimizer: str
    accumulates: bool = False
    """A weight's gradient is added to its buffer within the matrix product."""
    repeats_heads: str = "never"
    """Repetition of key-value heads for scaled_dot_product_attention, because not all of its kernels without an n x n matrix support
    grouped heads: never, masked (only with a mask), always.
    """
    on_gpu: bool = False
    reasons: tuple[str, ...] = ()
    """Requested kernels that are not used, with the reason."""

    def repeats(self, masked: bool) -> bool:
        """Return whether key-value heads are repeated in a call with (masked) or without a mask."""
        return self.repeats_heads == "always" or (masked and self.repeats_heads == "masked")

    def lines(self) -> list[tuple[str, str]]:
        """Return (what, by what) for people."""
        packed = {
            "flash-attn": "flash-attn, all samples of a row in one call",
            "torch-varlen": "torch's variable-length flash attention, all samples of a row in one call",
            "by-sample": "torch scaled_dot_product_attention, once a sample",
        }
        kernel = "its memory-efficient kernel" if self.repeats_heads == "always" else "its flash kernel"
        compiled = "compiled by torch, one kernel each" if self.fused else "torch"
        return [
            (
                "attention",
                f"torch scaled_dot_product_attention ({kernel})"
                if self.on_gpu
                else "torch scaled_dot_product_attention",
            ),
            ("packed attention", packed[self.packed_attention]),
            ("norms", "torch"),
            ("activation, loss", compiled),
            (
                "weight gradients",
                "added within the matrix product" if self.accumulates else "added to their buffer after it",
            ),
            ("optimizer", self.optimizer),
        ]


def choose(kernels: Kernels, numerics: Numerics, here: Machine, attention: Attention = Attention()) -> Choice:
    """Return what computes what. Pure: the same answer for the same machine, flags and model."""
    packed, reasons = _packed_attention(kernels, numerics, here, attention)
    half = numerics.bf16 or numerics.fp16
    if here.has_gpu and kernels.fused_kernels and not here.compiles:
        reasons.append(
            f"compiled kernels: {here.why_not('compiles')}; torch's operations are used one by one, which is slower"
        )
    if here.has_gpu and numerics.bf16 and here.capability < FLASH_CAPABILITY:
        reasons.append(
            f"--bf16: this GPU (compute capability {dotted(here.capability)}) has no units for it and will be slow: use --fp16"
        )
    optimizer = "torch's fused AdamW"
    if here.transformer_engine:
        optimizer = "Transformer Engine's FusedAdam"
    elif here.apex:
        optimizer = "apex's FusedAdam"
    grouped = "always" if not (half and here.flash) else "masked"
    return Choice(
        packed,
        fused=here.compiles and kernels.fused_kernels,
        optimizer=optimizer,
        accumulates=here.accumulates and kernels.gradient_accumulation_fusion,
        repeats_heads=grouped if here.has_gpu else "never",
        on_gpu=here.has_gpu,
        reasons=tuple(reasons),
    )


def _packed_attention(
    kernels: Kernels, numerics: Numerics, here: Machine, attention: Attention
) -> tuple[str, list[str]]:
    """Return the kernel, and why it is not the one that was asked for."""
    half = numerics.bf16 or numerics.fp16
    if not here.has_gpu:
        return "by-sample", ["--use_flash_attn: this machine has no GPU"] if kernels.use_flash_attn else []
    if not half:
        return "by-sample", ["--use_flash_attn: flash kernels need --bf16 or --fp16"] if kernels.use_flash_attn else []
    if not here.flash:
        found = dotted(here.capability)
        return "by-sample", [
            f"flash kernels need compute capability 8.0, this GPU has {found}: samples are attended one by one"
        ]
    if kernels.use_flash_attn and here.flash_attn:
        return "flash-attn", []
    reasons = []
    if kernels.use_flash_attn:
        reasons.append(f"--use_flash_attn: flash-attn is {here.why_not('flash_attn')}; torch's own attention is used")
    why: str | None
    if numerics.attention_dropout:
        why = "--attention_dropout: torch's variable-length attention has none"
    else:
        why = _varlen_lacks(here, attention)
    if why is None:
        return "torch-varlen", reasons
    return "by-sample", [*reasons, f"{why}, so samples are attended one by one"]


def _varlen_lacks(here: Machine, attention: Attention) -> str | None:
    """Return what torch's variable-length attention cannot do of what the model asks; None: it can all."""
    if not here.varlen:
        return "this torch has no variable-length attention (2.10 has)"
    asked = {"enable_gqa": attention.grouped, "window_size": attention.window, "scale": attention.scaled}
    if lacking := [name for name, needed in asked.items() if needed and name not in here.varlen]:
        return f"the variable-length attention of this torch has no {', '.join(lacking)} (2.12 has)"
    return None


def check_context_parallel(parallel: Parallelism, here: Machine) -> None:
    """Raise ConfigError where this machine cannot attend over rows that several processes share."""
    size = parallel.context_parallel_size
    if size > 1 and not (here.has_gpu and here.transformer_engine):
        lacks = "this machine has no GPU" if not here.has_gpu else "Transformer Engine is not installed"
        raise ConfigError(
            f"--context_parallel_size {size}: only Transformer Engine's attention shares a row among processes, on GPUs, and {lacks}: "
            f"use --sequence_parallel with --tensor_model_parallel_size, or --recompute_granularity full, for long rows"
        )


def varlen_attention(choice: Choice) -> Callable | None:
    """Return f(query [t, n, d], key and value [t, g, d], boundaries int32, longest, scale, window, dropout) -> [t, n, d], which is causal
    within each sample; None: attend sample by sample. window: keys that a token sees, itself included; None: all before it.
    """
    return {"flash-attn": _flash_attn, "torch-varlen": _torch_varlen}.get(choice.packed_attention)


def _flash_attn(
    query: Tensor, key: Tensor, value: Tensor, boundaries: Tensor, longest: int, scale: float, window: int | None, dropout: float
) -> Tensor:  # fmt: skip
    from flash_attn import flash_attn_varlen_func

    left = -1 if window is None else window - 1
    return flash_attn_varlen_func(
        query, key, value, boundaries, boundaries, longest, longest, dropout_p=dropout, softmax_scale=scale, causal=True,
        window_size=(left, 0 if window else -1),
    )  # fmt: skip


def _torch_varlen(
    query: Tensor, key: Tensor, value: Tensor, boundaries: Tensor, longest: int, scale: float, window: int | None, dropout: float
) -> Tensor:  # fmt: skip
    """Call torch's kernel by its signature: 2.10 has is_causal, no scale and no window; 2.11 no enable_gqa; 2.12 all of them.

    `choose` has checked that it supports what the model needs.
    """
    from torch.nn.attention.varlen import varlen_attn

    assert not dropout, "torch's variable-length attention has no dropout"
    known, left = varlen_arguments(), -1 if window is None else window - 1
    asked: dict[str, Any] = {"window_size": (left, 0)} if "window_size" in known else {"is_causal": True}
    if "scale" in known:
        asked["scale"] = scale
    if "enable_gqa" in known:
        asked["enable_gqa"] = query.shape[1] != key.shape[1]
    context: Any = varlen_attn(query, key, value, boundaries, boundaries, longest, longest, **asked)
    return context
