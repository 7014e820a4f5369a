"""Core attention over torch's scaled_dot_product_attention: causal, grouped KV heads, packed samples, sliding window.

Everything around it (QKV projection, rotary embedding, KV cache, output projection) is megatron-core's SelfAttention. A packed batch
comes as one long row whose sample boundaries are in RowParams; each sample is attended on its own, so that no token sees another sample
(equal to separate forwards, not merely close).
"""

from __future__ import annotations

import math

import torch
from megatron.core import tensor_parallel
from megatron.core.transformer.enums import AttnMaskType
from megatron.core.transformer.module import MegatronModule
from megatron.core.transformer.utils import is_layer_window_attention
from torch.nn.functional import scaled_dot_product_attention

from megatron_ft.models.kernels import varlen_attention


class SdpaAttention(MegatronModule):
    """A drop-in for megatron-core's DotProductAttention."""

    def __init__(
        self, config, layer_number, attn_mask_type, attention_type,
        attention_dropout=None, softmax_scale=None, cp_comm_type=None, pg_collection=None, kernels=None,
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
        self, query, key, value, attention_mask=None, attn_mask_type=None, attention_bias=None, packed_seq_params=None
    ):
        """Query [s, b, n, d], key and value [s_k, b, g, d] with g dividing n; of a packed row b is 1.

        Returns the context, [s, b, n*d]. Only causal masks and, when decoding from a KV cache, no mask.
        """
        assert attention_bias is None and attention_mask is None, "SdpaAttention knows causal and packed masks only"
        causal = (attn_mask_type or self.attn_mask_type) == AttnMaskType.causal
        with self._dropout_stream():
            if getattr(packed_seq_params, "boundaries", None) is not None:
                return self._packed(query.squeeze(1), key.squeeze(1), value.squeeze(1), packed_seq_params)[:, None]
            context = self._attend(*(x.permute(1, 2, 0, 3) for x in (query, key, value)), causal=causal)
            return context.permute(2, 0, 1, 3).reshape(query.shape[0], query.shape[1], -1)

    def _packed(self, query, key, value, rows):
        """Query [t, n, d], key and value [t, g, d] -> [t, n*d]."""
        if self.varlen is not None:
            dropout = self.dropout if self.training else 0.0
            options = (rows.boundaries, rows.max_seqlen_q, self.scale, self.window, dropout)
            return self.varlen(query, key, value.contiguous(), *options).reshape(query.shape[0], -1)
        samples = zip(*(x.transpose(0, 1).split(rows.lengths, dim=1) for x in (query, key, value)), strict=True)
        context = [self._attend(q[None], k[None], v[None], causal=True) for q, k, v in samples]
        return torch.cat(context, dim=2)[0].transpose(0, 1).reshape(query.shape[0], -1)

    def _attend(self, query, key, value, causal):
        """Query [b, n, s, d], key and value [b, g, s_k, d] -> [b, n, s, d]."""
        if self.window is None or key.shape[2] <= self.window:
            return self._sdpa(query, key, value, is_causal=causal and query.shape[2] > 1)
        return self._windowed(query, key, value)

    def _windowed(self, query, key, value):
        """The queries are the last s of s_k positions. In blocks of one window, so that a mask never exceeds window x 2 windows."""
        before, blocks = key.shape[2] - query.shape[2], []
        for start in range(0, query.shape[2], self.window):
            stop = min(start + self.window, query.shape[2])
            oldest = max(0, before + start - self.window + 1)
            seen = slice(oldest, before + stop)
            distance = torch.arange(before + start, before + stop, device=query.device)[:, None] - torch.arange(
                oldest, before + stop, device=query.device
            )
            mask = (distance >= 0) & (distance < self.window)
            blocks.append(self._sdpa(query[:, :, start:stop], key[:, :, seen], value[:, :, seen], attn_mask=mask))
        return torch.cat(blocks, dim=2)

    def _sdpa(self, query, key, value, **mask):
        if self.kernels and query.shape[1] != key.shape[1] and self.kernels.repeats(masked="attn_mask" in mask):
            key, value = (x.repeat_interleave(query.shape[1] // key.shape[1], dim=1) for x in (key, value))
        return scaled_dot_product_attention(
            query, key, value, scale=self.scale, dropout_p=self.dropout if self.training else 0.0,
            enable_gqa=query.shape[1] != key.shape[1], **mask,
        )  # fmt: skip

    def _dropout_stream(self):
        """Attention dropout differs between tensor-parallel ranks; under sequence parallelism the block has forked already."""
        if self.config.sequence_parallel or not (self.training and self.dropout > 0):
            return torch.autograd.profiler.record_function("core_attention")
        return tensor_parallel.get_cuda_rng_tracker().fork()
