"""Core attention with torch's scaled_dot_product_attention: causal, grouped KV heads, packed samples, sliding window.

Everything around it (QKV projection, rotary embedding, KV cache, output projection) is megatron-core's SelfAttention. A packed batch is
one long row; RowParams has the boundaries of its samples. Each sample is attended separately, so that no token attends to another sample
(bit-identical to separate forward passes).
"""

from __future__ import annotations

import contextlib
import math
from typing import Any

import torch
from megatron.core import tensor_parallel
from megatron.core.transformer.enums import AttnMaskType
from megatron.core.transformer.module import MegatronModule
from megatron.core.transformer.utils import is_layer_window_attention
from torch import Tensor
from torch.nn.functional import scaled_dot_product_attention

from megatron_ft.models.kernels import Choice, varlen_attention


class SdpaAttention(MegatronModule):
    """A drop-in for megatron-core's DotProductAttention."""

    def __init__(
        self, config: Any, layer_number: int, attn_mask_type: Any, attention_type: str,
        attention_dropout: float | None = None, softmax_scale: float | None = None, cp_comm_type: Any = None,
        pg_collection: Any = None, kernels: Choice | None = None,
    ):  # fmt: skip
        """kernels: a kernels.Choice; None: torch's operations, packed samples one after another."""
        super().__init__(config=config)
        self.scale = softmax_scale or 1.0 / math.sqrt(config.kv_channels)
        self.dropout = config.attention_dropout if attention_dropout is None else attention_dropout
        self.attn_mask_type, self.kernels = attn_mask_type, kernels
        self.varlen = varlen_attention(kernels) if kernels else None
        windowed = is_layer_window_attention(config.window_size, config.window_attn_skip_freq, layer_number)
        self.window = config.window_size[0] + 1 if windowed else None

    def forward(
        self, query: Tensor, key: Tensor, value: Tensor, attention_mask: Tensor | None = None, attn_mask_type: Any = None,
        attention_bias: Any = None, packed_seq_params: Any = None,
    ) -> Tensor:  # fmt: skip
        """Compute attention of query [s, b, n, d], key and value [s_k, b, g, d], where g divides n; b is 1 for a packed row.

        Return the context, [s, b, n*d]. Only causal masks and, when decoding from a KV cache, no mask.
        """
        assert attention_bias is None and attention_mask is None, "SdpaAttention knows causal and packed masks only"
        causal = (attn_mask_type or self.attn_mask_type) == AttnMaskType.causal
        with self._dropout_stream():
            if getattr(packed_seq_params, "boundaries", None) is not None:
                return self._packed(query.squeeze(1), key.squeeze(1), value.squeeze(1), packed_seq_params)[:, None]
            q, k, v = (x.permute(1, 2, 0, 3) for x in (query, key, value))
            context = self._attend(q, k, v, causal)
            return context.permute(2, 0, 1, 3).reshape(query.shape[0], query.shape[1], -1)

    def _packed(self, query: Tensor, key: Tensor, value: Tensor, rows: Any) -> Tensor:
        """Attend within each sample: query [t, n, d], key and value [t, g, d] -> [t, n*d]."""
        if self.varlen is not None:
            dropout = self.dropout if self.training else 0.0
            options = (rows.boundaries, rows.max_seqlen_q, self.scale, self.window, dropout)
            return self.varlen(query, key, value.contiguous(), *options).reshape(query.shape[0], -1)
        samples = zip(*(x.transpose(0, 1).split(rows.lengths, dim=1) for x in (query, key, value)), strict=True)
        context = [self._attend(q[None], k[None], v[None], causal=True) for q, k, v in samples]
        return torch.cat(context, dim=2)[0].transpose(0, 1).reshape(query.shape[0], -1)

    def _attend(self, query: Tensor, key: Tensor, value: Tensor, causal: bool) -> Tensor:
        """Attend: query [b, n, s, d], key and value [b, g, s_k, d] -> [b, n, s, d]."""
        if self.window is None or key.shape[2] <= self.window:
            return self._sdpa(query, key, value, is_causal=causal and query.shape[2] > 1)
        return self._windowed(query, key, value, self.window)

    def _windowed(self, query: Tensor, key: Tensor, value: Tensor, window: int) -> Tensor:
        """Attend in blocks of one window, so that a mask has at most window x 2 windows entries. The queries are the last s of s_k
        positions.
        """
        before, blocks = key.shape[2] - query.shape[2], []
        for start in range(0, query.shape[2], window):
            stop = min(start + window, query.shape[2])
            oldest = max(0, before + start - window + 1)
            seen = slice(oldest, before + stop)
            distance = torch.arange(before + start, before + stop, device=query.device)[:, None] - torch.arange(
                oldest, before + stop, device=query.device
            )
            mask = (distance >= 0) & (distance < window)
            blocks.append(self._sdpa(query[:, :, start:stop], key[:, :, seen], value[:, :, seen], attn_mask=mask))
        return torch.cat(blocks, dim=2)

    def _sdpa(self, query: Tensor, key: Tensor, value: Tensor, **mask: Any) -> Tensor:
        if self.kernels and query.shape[1] != key.shape[1] and self.kernels.repeats(masked="attn_mask" in mask):
            key, value = (x.repeat_interleave(query.shape[1] // key.shape[1], dim=1) for x in (key, value))
        return scaled_dot_product_attention(
            query, key, value, scale=self.scale, dropout_p=self.dropout if self.training else 0.0,
            enable_gqa=query.shape[1] != key.shape[1], **mask,
        )  # fmt: skip

    def _dropout_stream(self) -> contextlib.AbstractContextManager:
        """Use the random stream of the tensor-parallel rank for attention dropout. Under sequence parallelism it is already in use."""
        if self.config.sequence_parallel or not (self.training and self.dropout > 0):
            return torch.autograd.profiler.record_function("core_attention")
        return tensor_parallel.get_cuda_rng_tracker().fork()
