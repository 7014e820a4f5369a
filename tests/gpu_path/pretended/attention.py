"""Attention that only a GPU has, computed with masks; the arguments are refused as flash kernels refuse them."""

from __future__ import annotations

from typing import Any

import torch
from torch.nn import functional

from tests.gpu_path.pretended.patches import replace
from tests.gpu_path.pretended.report import COUNTS
from tests.gpu_path.pretended.tensor import Gpu, Refused, gpu, touch

LARGEST_HEAD = 256


def install() -> None:
    """Replace scaled_dot_product_attention."""
    replace(
        functional, "scaled_dot_product_attention", _with_mask_of_its_device(functional.scaled_dot_product_attention)
    )


def _with_mask_of_its_device(plain):
    """With dropout torch falls back to its C++, which makes a causal mask where it believes the tensors to be; here it is given one."""

    def attention(query, key, value, attn_mask=None, dropout_p=0.0, is_causal=False, **more):
        if isinstance(query, Gpu) and is_causal and dropout_p:
            attn_mask = torch.ones(query.shape[-2], key.shape[-2], dtype=torch.bool, device=gpu()).tril()
            is_causal = False
        return plain(query, key, value, attn_mask=attn_mask, dropout_p=dropout_p, is_causal=is_causal, **more)

    return attention


def check_arguments(query, key, value, boundaries, longest: int) -> None:
    """Raise Refused for tensors [t, n, d] that a flash kernel does not take."""
    for name, x in (("query", query), ("key", key), ("value", value)):
        if x.dtype not in (torch.float16, torch.bfloat16):
            raise Refused(f"FlashAttention only support fp16 and bf16 data type: {name} is {x.dtype}")
        if not isinstance(x, Gpu) or x.dim() != 3 or x.stride(-1) != 1 or x.shape[-1] % 8 or x.shape[-1] > LARGEST_HEAD:
            raise Refused(f"flash attention: {name} {x.device} {tuple(x.shape)}, strides {x.stride()}")
    if boundaries.dtype != torch.int32 or not isinstance(boundaries, Gpu) or not boundaries.is_contiguous():
        raise Refused(f"flash attention: boundaries {boundaries.dtype} {boundaries.device}")
    if not isinstance(longest, int):
        raise Refused(f"flash attention: the longest sample is a {type(longest).__name__}, no int")
    if query.shape[1] % key.shape[1]:
        raise Refused(f"flash attention: {query.shape[1]} heads are no multiple of {key.shape[1]}")


def attended(query, key, value, boundaries, scale, window: tuple[int, int], dropout: float = 0.0) -> torch.Tensor:
    """Return [t, n, d]: each sample attends to itself only. window: keys to the left and to the right, -1 for all; computed in fp32."""
    weights = _weights(query, key, boundaries, scale, window)
    if dropout:
        weights = functional.dropout(weights, dropout)
    return (weights @ _heads(value, query.shape[1])).transpose(0, 1).to(query.dtype)


def _attended_backward(grad, query, key, value, boundaries, scale, window) -> list[torch.Tensor]:
    """Written out: autograd records nothing below the dispatcher. P = softmax(S): dS = P (dP - sum of P dP along the row)."""
    heads, groups = query.shape[1], key.shape[1]
    weights, grad = _weights(query, key, boundaries, scale, window), _heads(grad, heads)
    of_weights = grad @ _heads(value, heads).transpose(1, 2)
    of_scores = (
        weights * (of_weights - (of_weights * weights).sum(-1, keepdim=True)) * (scale or query.shape[-1] ** -0.5)
    )
    of_query = of_scores @ _heads(key, heads)
    of_key, of_value = of_scores.transpose(1, 2) @ _heads(query, heads), weights.transpose(1, 2) @ grad
    shared = [x.unflatten(0, (groups, heads // groups)).sum(1) for x in (of_key, of_value)]
    return [x.transpose(0, 1).to(query.dtype) for x in (of_query, *shared)]


def _weights(query, key, boundaries, scale, window) -> torch.Tensor:
    """Return [n, t, t], rows summing to 1."""
    places = torch.arange(query.shape[0], device=query.device, dtype=torch.int32)
    sample = torch.searchsorted(boundaries, places, right=True)
    before = places[:, None] - places
    seen = sample[:, None] == sample
    left, right = window
    if right >= 0:
        seen = seen & (before >= -right)
    if left >= 0:
        seen = seen & (before <= left)
    scores = _heads(query, query.shape[1]) @ _heads(key, query.shape[1]).transpose(1, 2)
    return (scores * (scale or query.shape[-1] ** -0.5)).masked_fill(~seen, float("-inf")).softmax(-1)


def _heads(x: torch.Tensor, heads: int) -> torch.Tensor:
    """[t, g, d] -> [n, t, d] in fp32, each group of heads sharing what it shares."""
    return x.repeat_interleave(heads // x.shape[1], 1).float().transpose(0, 1)


def variable_length(func: Any, args: tuple, kwargs: dict) -> tuple:
    """Carry out an operation of torch.nn.attention.varlen, whose Python has looked at the arguments before."""
    touch(func)
    COUNTS.operations[str(func)] += 1
    given = dict(zip((a.name for a in func._schema.arguments), args, strict=False)) | kwargs
    query, key, value, boundaries = (given[name] for name in ("query", "key", "value", "cu_seq_q"))
    check_arguments(query, key, value, boundaries, given["max_q"])
    check_arguments(query, key, value, given["cu_seq_k"], given["max_k"])
    window = tuple(given.get("window_size") or (-1, -1))
    window = (window[0], 0) if given.get("is_causal") else window
    hosts = [x.host for x in (query, key, value, boundaries)]
    if "backward" in str(func):
        grads = _attended_backward(given["grad_out"].host, *hosts, given.get("scale"), window)
        return tuple(Gpu(x) for x in grads)
    out = attended(*hosts, given.get("scale"), window)
    log_sums = torch.zeros(query.shape[1], query.shape[0])
    return Gpu(out), Gpu(log_sums), Gpu(torch.zeros(2, dtype=torch.uint64))
