"""Residual dropout that is the same in every layout: a mask is a function of (seed, row, position, layer, channel).

The usual dropout draws from a separate stream on each rank, so a run with TP2 x PP2 drops other entries than a run on one process. Here a
hash decides if an entry is dropped: of its token's key (row and position in the whole run, see `token_keys`), its layer and its channel.
So the masks do not depend on tensor, sequence, pipeline or data parallelism, on the microbatch size, on a stop and resume, or on
recomputation in the backward pass, and no random state is saved. Dropout on attention weights is not done here: the attention kernels
draw it from the streams of each rank.

The mixing constants are those of lowbias32 (Wellons 2018) and splitmix64 (Steele, Lea & Flood 2014).
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import numpy as np
import torch
from megatron.core.transformer.transformer_layer import TransformerLayer
from torch import Tensor, nn

_WRAP = 1 << 32


def token_keys(seed: int, rows: Sequence[int] | np.ndarray, length: int) -> np.ndarray:
    """Return a key for each position of some rows, [2, b, length] int32. rows: their running numbers since the start of training, [b]."""
    row = _mix64(np.asarray(rows, np.uint64) ^ _mix64(np.asarray([seed], np.uint64)))
    keys = _mix64(row[:, None] + np.arange(1, length + 1, dtype=np.uint64) * np.uint64(0x9E3779B97F4A7C15))
    return np.stack([keys >> np.uint64(32), keys & np.uint64(_WRAP - 1)]).astype(np.uint32).view(np.int32)


def _mix64(x: np.ndarray) -> np.ndarray:
    """Apply the finaliser of splitmix64; unsigned, wrapping."""
    with np.errstate(over="ignore"):
        x = (x ^ (x >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
        x = (x ^ (x >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return x ^ (x >> np.uint64(31))


class Place(NamedTuple):
    """The numbers of one residual add. The compiled kernel takes them as arguments, so it is compiled once for all layers and rates."""

    words: Tensor
    """[3] int32. Two words that are mixed into the halves of every token's key, and a bound: entries whose bits are below it are dropped.

    A tensor, not three Python integers. In a compiled kernel those may be 64 bits wide (Inductor of torch 2.11 computes with them in
    the type of its indices); arithmetic then no longer wraps at 32 bits, and other entries are dropped.
    """
    scale: float
    """1 / (1 - p)"""


@functools.lru_cache(maxsize=4096)
def place_of(number: int, p: float, where: torch.device) -> Place:
    """Return the numbers of the residual add `number` (0: the embedding) at rate p, 0 <= p < 1."""
    first, second = (int(half) for half in token_keys(number, np.zeros(1), 1).ravel())
    bound = round(p * _WRAP) - _WRAP // 2
    return Place(torch.tensor([first, second, bound], dtype=torch.int32, device=where), 1 / (1 - p))


def keep_mask(keys: Tensor, channels: int, number: int, p: float) -> Tensor:
    """Return a mask that is True where an entry is kept, [s, b, channels] bool. keys [2, s, b]; number: of the residual add."""
    return _keep_mask(keys, channel_bits(channels, keys.device), place_of(number, p, keys.device).words)


def _keep_mask(keys: Tensor, channels: Tensor, words: Tensor) -> Tensor:
    """Return keep_mask. channels [h]: channel_bits; words: see Place. All int32."""
    token = _mix32(keys[0] ^ words[0])[..., None]
    bits = token ^ channels
    bits *= _signed(0x7FEB352D)
    bits ^= (bits >> 15) & 0x1FFFF
    bits += _mix32(keys[1] ^ words[1])[..., None]
    bits *= _signed(0x846CA68B)
    return bits >= words[2]  # a comparison, because the high bits are mixed best


@functools.cache
def channel_bits(channels: int, where: torch.device) -> Tensor:
    """Return a hash of each channel's number, [channels] int32."""
    return _mix32(torch.arange(1, channels + 1, dtype=torch.int32, device=where))


def _mix32(x: Tensor) -> Tensor:
    """Apply lowbias32 to int32, whose multiplication wraps; `& mask` makes the arithmetic shift a logical one."""
    x = (x ^ ((x >> 16) & 0xFFFF)) * _signed(0x7FEB352D)
    x = (x ^ ((x >> 15) & 0x1FFFF)) * _signed(0x846CA68B)
    return x ^ ((x >> 16) & 0xFFFF)


def _signed(word: int) -> int:
    return word - _WRAP if word >= _WRAP // 2 else word


def _dropped(x: Tensor, keys: Tensor, channels: Tensor, words: Tensor, scale: float) -> Tensor:
    return torch.where(_keep_mask(keys, channels, words), x, x.new_zeros(())) * scale


def _dropped_add(x: Tensor, residual: Tensor, keys: Tensor, channels: Tensor, words: Tensor, scale: float) -> Tensor:
    return residual + _dropped(x, keys, channels, words, scale)


class FusedDroppedAdd(torch.autograd.Function):
    """Compute residual + dropped x in one compiled kernel, and its gradient in another, which computes the mask again.

    One graph with its gradient would make the first step on a GPU almost a minute longer (torch 2.11).
    """

    @staticmethod
    def forward(
        ctx: Any, x: Tensor, residual: Tensor, keys: Tensor, channels: Tensor, words: Tensor, scale: float
    ) -> Tensor:
        ctx.save_for_backward(keys, channels, words)
        ctx.scale, ctx.dtype = scale, x.dtype
        # Detached, because Dynamo would compile two graphs: with and without a gradient.
        return _compiled(_dropped_add)(x.detach(), residual.detach(), keys, channels, words, scale)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        return _compiled(_dropped)(grad.to(ctx.dtype), *ctx.saved_tensors, ctx.scale), grad, None, None, None, None


@functools.cache
def _compiled(function: Callable[..., Tensor]) -> Callable[..., Tensor]:
    return torch.compile(function, dynamic=True)


def dropped(x: Tensor, keys: Tensor, number: int, p: float, first_channel: int = 0) -> Tensor:
    """Return x [s, b, h] with entries dropped at rate p and the others scaled by 1 / (1 - p).

    number: of the residual add. first_channel: of x, where a rank has only some of the channels.
    """
    if p >= 1:
        return x * 0
    channels = channel_bits(first_channel + x.shape[-1], x.device)[first_channel:]
    return _dropped(x, keys, channels, *place_of(number, p, x.device))


class RowDropout(nn.Module):
    """nn.Dropout for the embedding's output [s, b, h]; the caller of the model sets `keys`."""

    keys: Tensor | None = None

    def __init__(self, p: float):
        super().__init__()
        self.p = p

    def forward(self, x: Tensor) -> Tensor:
        if not (self.training and self.p):
            return x
        assert self.keys is not None, "dropout needs the microbatch's token keys (RowParams)"
        return dropped(x, self.keys, 0, self.p)


class RowLayer(TransformerLayer):
    """The engine's layer with residual dropout by token keys. `hidden_dropout` is read at every call, as in the engine.

    fused: whether dropout and residual add are one compiled kernel (kernels.Choice.fused). rope: (number, count): which of the
    rotary embeddings in the model's table is used in this layer.
    """

    keys: Tensor | None = None

    def __init__(self, *args: Any, fused: bool = False, rope: tuple[int, int] = (0, 1), **options: Any):
        super().__init__(*args, **options)
        self.fused, self.rope = fused, rope
        self.self_attn_bda = functools.partial(self._join, 0)
        self.mlp_bda = functools.partial(self._join, 1)

    def forward(
        self,
        hidden_states: Tensor,
        *args: Any,
        packed_seq_params: Any = None,
        rotary_pos_emb: Any = None,
        **options: Any,
    ) -> tuple[Tensor, Tensor | None]:
        self.keys = getattr(packed_seq_params, "keys", None)
        table = self.own_table(rotary_pos_emb)
        options |= {"packed_seq_params": packed_seq_params, "rotary_pos_emb": table}
        return super().forward(hidden_states, *args, **options)

    def own_table(self, table: Tensor | None) -> Tensor | None:
        """Return this layer's part of the rotary table."""
        number, count = self.rope
        return table if table is None or count == 1 else table.chunk(count, dim=-1)[number]

    def _join(self, number: int, training: bool, fused: bool) -> Callable[..., Tensor]:
        """Return the engine's bias_dropout_add: ((x, bias), residual, p) -> residual + dropout(x + bias)."""

        def join(x_with_bias: tuple[Tensor, Tensor | None], residual: Tensor, p: float) -> Tensor:
            x, bias = x_with_bias
            x = x if bias is None else x + bias
            if not (training and p):
                return residual + x
            assert self.keys is not None, "dropout needs the microbatch's token keys (RowParams)"
            place = 2 * self.layer_number + number
            if p >= 1 or not self.fused:
                return residual + dropped(x, self.keys, place, p)
            channels = channel_bits(x.shape[-1], x.device)
            return FusedDroppedAdd.apply(x, residual, self.keys, channels, *place_of(place, p, x.device))

        return join
