"""Compare attention over packed samples with the formula in fp32, one sample at a time: outputs and gradients."""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import torch
from megatron.core.transformer.enums import AttnMaskType
from torch import Tensor

from megatron_ft import device
from megatron_ft.config.sections import Kernels, Numerics
from megatron_ft.doctor.result import Found, failed, passed, skipped
from megatron_ft.doctor.small_model import LLAMA
from megatron_ft.engine.parallel import Layout
from megatron_ft.models.attention import SdpaAttention
from megatron_ft.models.build import BuildOptions, transformer_config
from megatron_ft.models.kernels import Attention, Choice, choose, varlen_attention
from megatron_ft.models.machine import FLASH_CAPABILITY, machine
from megatron_ft.models.rows import packed_on

LENGTHS = (1, 7, 64, 65, 130, 33)
"""Lengths of the samples of a row: around the block sizes of kernels, and a single token."""
HEADS = 8
CASES = list(itertools.product((64, 128), (HEADS, 2), (None, 24)))
"""(head size, groups of keys and values, sliding window)."""
BOUND = {torch.bfloat16: 3e-2, torch.float32: 1e-5}
"""Largest difference, relative to the largest entry. A window wrong by one key, or attention across samples, gives far more."""

Attend = Callable[[Tensor, Tensor, Tensor, Tensor, int, float, int | None], Tensor]
"""f(query [t, n, d], key and value [t, g, d], boundaries int32 [samples + 1], longest, scale, window) -> [t, n, d]."""


def by_sample(folder: Path) -> Found:
    """Check the loop over samples with scaled_dot_product_attention, which runs if no kernel computes all samples at once."""
    dtype = torch.bfloat16 if device.has_gpu() else torch.float32
    return compared("torch scaled_dot_product_attention, one call per sample", _by_sample, dtype)


def torch_varlen(folder: Path) -> Found:
    """Check torch's variable-length attention with grouped heads and windows."""
    here = machine()
    if not here.flash:
        return skipped(f"flash kernels need a GPU of sm{'{}{}'.format(*FLASH_CAPABILITY)} or later")
    choice = choose(Kernels(), Numerics(bf16=True), here, Attention(grouped=True, window=True))
    if choice.packed_attention != "torch-varlen":
        return skipped("; ".join(choice.reasons))
    return compared("torch's variable-length attention", _kernel("torch-varlen"), torch.bfloat16)


def flash_attn(folder: Path) -> Found:
    """Check the flash-attn package. Fail if it is installed but broken, skip if it is not installed."""
    here = machine()
    if not here.flash:
        return skipped(f"flash kernels need a GPU of sm{'{}{}'.format(*FLASH_CAPABILITY)} or later")
    if not here.flash_attn:
        why = here.why_not("flash_attn")
        return (
            skipped("not installed; torch's own is used") if why == "not installed" else failed(f"flash-attn is {why}")
        )
    return compared("flash-attn", _kernel("flash-attn"), torch.bfloat16)


def compared(what: str, attend: Attend, dtype: torch.dtype) -> Found:
    """Compare all CASES; fail if one is beyond the bound."""
    worst, where = 0.0, ""
    for head, groups, window in CASES:
        apart = difference(attend, head, groups, window, dtype)
        case = f"head size {head}, {HEADS} heads over {groups} groups, " + (
            f"window {window}" if window else "no window"
        )
        if not apart <= BOUND[dtype]:
            return failed(f"{what}: {apart:.1e} from the formula (bound {BOUND[dtype]:.0e}) with {case}")
        worst, where = max((worst, where), (apart, case))
    return passed(
        f"{len(CASES)} cases, outputs and gradients within {worst:.0e} (bound {BOUND[dtype]:.0e}); worst: {where}"
    )


def difference(attend: Attend, head: int, groups: int, window: int | None, dtype: torch.dtype) -> float:
    """Return the largest difference of the output or a gradient from the formula's, relative to the largest entry of each."""
    stream = torch.Generator().manual_seed(head + groups)
    sizes = (HEADS, groups, groups, HEADS)
    made = [
        torch.randn((sum(LENGTHS), size, head), generator=stream).to(device.current_device(), dtype) for size in sizes
    ]
    query, key, value, upstream = made
    boundaries = torch.tensor([0, *itertools.accumulate(LENGTHS)], dtype=torch.int32, device=query.device)
    scale = 1 / math.sqrt(head)
    found = _with_gradients(
        lambda q, k, v: attend(q, k, v, boundaries, max(LENGTHS), scale, window), (query, key, value), upstream
    )
    expected = _with_gradients(
        lambda q, k, v: formula(q, k, v, scale, window), tuple(x.float() for x in (query, key, value)), upstream.float()
    )
    apart = [
        float((one.float() - other).abs().max() / other.abs().max()) for one, other in zip(found, expected, strict=True)
    ]
    return math.inf if any(map(math.isnan, apart)) else max(apart)


def _with_gradients(function: Callable, inputs: tuple[Tensor, ...], upstream: Tensor) -> list[Tensor]:
    leaves = [x.detach().requires_grad_() for x in inputs]
    output = function(*leaves)
    return [output.detach(), *torch.autograd.grad(output, leaves, upstream)]


def formula(query: Tensor, key: Tensor, value: Tensor, scale: float, window: int | None) -> Tensor:
    """Return softmax(q k' scale) v with a mask, sample by sample: query [t, n, d], key and value [t, g, d] -> [t, n, d]."""
    outputs = []
    for q, k, v in zip(*(x.split(LENGTHS) for x in (query, key, value)), strict=True):
        k, v = (x.repeat_interleave(q.shape[1] // x.shape[1], dim=1) for x in (k, v))
        back = torch.arange(len(q), device=q.device)[:, None] - torch.arange(len(q), device=q.device)
        seen = (back >= 0) & (back < (window or len(q)))
        scores = torch.einsum("qnd,knd->nqk", q, k) * scale
        outputs.append(torch.einsum("nqk,knd->qnd", scores.masked_fill(~seen, -math.inf).softmax(-1), v))
    return torch.cat(outputs)


def _kernel(name: str) -> Attend:
    kernel = varlen_attention(Choice(name, False, ""))
    assert kernel is not None, name
    return lambda *given: kernel(*given, 0.0)


def _by_sample(
    query: Tensor, key: Tensor, value: Tensor, boundaries: Tensor, longest: int, scale: float, window: int | None
) -> Tensor:
    """Compute SdpaAttention as a layer of the model does."""
    heads, head, groups = query.shape[1], query.shape[2], key.shape[1]
    arch = replace(
        LLAMA,
        num_attention_heads=heads,
        num_query_groups=groups,
        head_dim=head,
        hidden_size=heads * head,
        sliding_window=window,
    )
    config = transformer_config(arch, Layout(1, 1, 1, 0, 0, 0, False, 0), BuildOptions(dtype=query.dtype))
    choice = replace(
        choose(Kernels(), Numerics(bf16=True), machine(), Attention(window=window is not None)),
        packed_attention="by-sample",
    )
    layer = SdpaAttention(config, 1, AttnMaskType.causal, "self", softmax_scale=scale, kernels=choice).eval()
    row = packed_on(boundaries.diff().tolist(), query.device)
    return layer(query[:, None], key[:, None], value[:, None], packed_seq_params=row).view(query.shape)
