"""torch.nn.attention.varlen.varlen_attn with the signatures of earlier releases, computed by the installed one's operation.

Read from the pages of torch's documentation: 2.10 (docs.pytorch.org/docs/2.10, "is_causal=False, return_aux=None", both positional),
2.11 (docs.pytorch.org/docs/main between the two releases, "*, return_aux=None, scale=None, window_size=(-1, -1)"), 2.12
(docs.pytorch.org/docs/2.12: "enable_gqa=False, seqused_k=None, block_table=None, num_splits=None" besides).
Before 2.12 nothing in Python looks at the number of key-value heads, and the kernel takes fewer than query heads.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator

import torch
from torch.nn.attention import varlen


def _attend(query, key, value, cu_seq_q, cu_seq_k, max_q, max_k, is_causal, scale, window):
    op = torch.ops.torch_attn._varlen_attn
    return op(query, key, value, cu_seq_q, cu_seq_k, max_q, max_k, is_causal, scale, window)[0]


def varlen_attn_2_10(query, key, value, cu_seq_q, cu_seq_k, max_q, max_k, is_causal=False, return_aux=None):
    """As in torch 2.10: no scale, no window."""
    return _attend(query, key, value, cu_seq_q, cu_seq_k, max_q, max_k, is_causal, None, [-1, -1])


def varlen_attn_2_11(
    query, key, value, cu_seq_q, cu_seq_k, max_q, max_k, *, return_aux=None, scale=None, window_size=(-1, -1)
):
    """As in torch 2.11: no enable_gqa."""
    causal = window_size == (-1, 0)
    return _attend(query, key, value, cu_seq_q, cu_seq_k, max_q, max_k, causal, scale, list(window_size))


RELEASES = {"2.10": varlen_attn_2_10, "2.11": varlen_attn_2_11}


@contextlib.contextmanager
def release(name: str | None) -> Iterator[None]:
    """Let torch have the function of another release for a while; None: its own."""
    own = varlen.varlen_attn
    varlen.varlen_attn = RELEASES[name] if name else own
    try:
        yield
    finally:
        varlen.varlen_attn = own
