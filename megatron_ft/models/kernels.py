"""The one place that chooses kernels: what computes attention, norms, activations, the loss and the update on this machine.

Two choices of kernel give the same result up to rounding. Nothing here is needed: without a GPU, and without any of the optional
packages, torch's own operations do. `doctor` prints the choice, training logs it once. No model is known here, no torch at import.
"""

from __future__ import annotations

import importlib.util
from collections.abc import Callable
from dataclasses import dataclass

from megatron_ft.config.sections import Kernels, Numerics, Parallelism
from megatron_ft.errors import ConfigError


@dataclass(frozen=True)
class Machine:
    """What choices depend on."""

    has_gpu: bool = False
    flash_attn: bool = False
    torch_varlen: bool = False
    """torch.nn.attention.varlen, in torch 2.10 and later"""
    transformer_engine: bool = False
    apex: bool = False
    """NVIDIA's, with its optimizers; another project of that name is on the package index"""


@dataclass(frozen=True)
class Choice:
    """What will compute what."""

    packed_attention: str
    """flash-attn, torch-varlen, or by-sample (scaled_dot_product_attention, once a sample)."""
    fused: bool
    """Activation, loss and residual dropout as compiled kernels, each one pass over its data."""
    optimizer: str
    reasons: tuple[str, ...] = ()
    """What was asked for and is not used, and why."""

    def lines(self) -> list[tuple[str, str]]:
        """(what, by what) for people."""
        packed = {
            "flash-attn": "flash-attn, all samples of a row in one call",
            "torch-varlen": "torch's variable-length flash attention, all samples of a row in one call",
            "by-sample": "torch scaled_dot_product_attention, once a sample",
        }
        compiled = "compiled by torch, one kernel each" if self.fused else "torch"
        return [
            (
                "attention",
                "torch scaled_dot_product_attention (its flash kernel where it has one); never a mask of n x n",
            ),
            ("packed attention", packed[self.packed_attention]),
            ("norms", "torch"),
            ("activation, loss", compiled),
            ("optimizer", self.optimizer),
        ]


def machine() -> Machine:
    """This one."""
    from megatron_ft import device

    return Machine(
        has_gpu=device.has_gpu(),
        flash_attn=_has("flash_attn"),
        torch_varlen=_has("torch.nn.attention.varlen"),
        transformer_engine=_has("transformer_engine"),
        apex=_has("apex") and _has("apex.optimizers"),
    )


def _has(module: str) -> bool:
    try:
        return importlib.util.find_spec(module) is not None
    except ImportError:
        return False


def choose(kernels: Kernels, numerics: Numerics, here: Machine) -> Choice:
    """Pure: the same answer for the same machine and flags."""
    reasons = []
    half = numerics.bf16 or numerics.fp16
    packed = "by-sample"
    if not here.has_gpu:
        reasons += ["--use_flash_attn: this machine has no GPU"] if kernels.use_flash_attn else []
    elif not half:
        reasons += ["--use_flash_attn: flash kernels need --bf16 or --fp16"] if kernels.use_flash_attn else []
    elif numerics.attention_dropout and not (kernels.use_flash_attn and here.flash_attn):
        reasons.append(
            "--attention_dropout: torch's variable-length attention has none, so samples are attended one by one"
        )
    elif kernels.use_flash_attn and here.flash_attn:
        packed = "flash-attn"
    elif here.torch_varlen:
        packed = "torch-varlen"
        if kernels.use_flash_attn:
            reasons.append("--use_flash_attn: flash-attn is not installed, torch's own flash attention is used")
    optimizer = "torch's fused AdamW"
    if here.transformer_engine:
        optimizer = "Transformer Engine's FusedAdam"
    elif here.apex:
        optimizer = "apex's FusedAdam"
    return Choice(packed, here.has_gpu and kernels.fused_kernels, optimizer, tuple(reasons))


def check_context_parallel(parallel: Parallelism, here: Machine) -> None:
    """Raises ConfigError where this machine cannot attend over rows that several processes share."""
    size = parallel.context_parallel_size
    if size > 1 and not (here.has_gpu and here.transformer_engine):
        lacks = "this machine has no GPU" if not here.has_gpu else "Transformer Engine is not installed"
        raise ConfigError(
            f"--context_parallel_size {size}: only Transformer Engine's attention shares a row among processes, on GPUs, and {lacks}: "
            f"use --sequence_parallel with --tensor_model_parallel_size, or --recompute_granularity full, for long rows"
        )


def varlen_attention(choice: Choice) -> Callable | None:
    """f(query [t, n, d], key and value [t, g, d], boundaries int32, longest, scale, window, dropout) -> [t, n, d], causal within
    each sample; None: attend sample by sample. window: keys a token sees, itself included; None: all before it.
    """
    return {"flash-attn": _flash_attn, "torch-varlen": _torch_varlen}.get(choice.packed_attention)


def _flash_attn(query, key, value, boundaries, longest, scale, window, dropout):
    from flash_attn import flash_attn_varlen_func

    left = -1 if window is None else window - 1
    return flash_attn_varlen_func(
        query, key, value, boundaries, boundaries, longest, longest, dropout_p=dropout, softmax_scale=scale, causal=True,
        window_size=(left, 0 if window else -1),
    )  # fmt: skip


def _torch_varlen(query, key, value, boundaries, longest, scale, window, dropout):
    from torch.nn.attention.varlen import varlen_attn

    assert not dropout, "torch's variable-length attention has no dropout"
    left = -1 if window is None else window - 1
    return varlen_attn(
        query, key, value, boundaries, boundaries, longest, longest, scale=scale, window_size=(left, 0),
        enable_gqa=query.shape[1] != key.shape[1],
    )  # fmt: skip
