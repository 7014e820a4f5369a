"""Rotary embedding by position: cosine and sine once per microbatch, and one operation that rotates queries or keys by them.

The engine computes cosine and sine of the same angles in every layer, for queries and for keys, and for packed rows sample by sample.
Here one table is computed, a packed row looks up its positions in it, and every layer receives the result. Without compilation it is
bit-identical to the engine's.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import torch
from megatron.core.models.common.embeddings.rope_utils import get_pos_emb_on_this_cp_rank
from megatron.core.models.common.embeddings.rotary_pos_embedding import RotaryEmbedding
from megatron.core.transformer import attention
from torch import Tensor

from megatron_ft import device
from megatron_ft.engine.versions import patch
from megatron_ft.models.architecture import Architecture
from megatron_ft.models.parts import Rope
from megatron_ft.models.rope import LENGTH_METHODS, inverse_frequencies, method_of

_TABLES = 32
"""Tables that are kept where frequencies depend on the length."""


class Rotary(RotaryEmbedding):
    """The model's rotary module. `positions` [s] is set by the caller of the model; None: tokens are counted from 0.

    Of methods whose frequencies depend on how long the text is (dynamic NTK, longrope), they follow the longest text of a batch, packed or
    padded, as in transformers; with a KV cache, the room in the cache, so that keys read early fit those read late.
    """

    positions: Tensor | None = None

    def __init__(self, arch: Architecture, dtype: torch.dtype, least: int, cp_group: Any):
        """least: positions for which the table is computed at once."""
        super().__init__(arch.rotary_dim, rotary_percent=1.0, rotary_base=arch.rope_theta, cp_group=cp_group)
        self.arch, self.dtype, self.least = arch, dtype, least
        self.ropes = ropes_of(arch)
        self._by_length = method_of(arch.rope_scaling) in LENGTH_METHODS
        self._tables: dict[int, Tensor] = {}

    def forward(self, max_seq_len: int, offset: int = 0, packed_seq: bool = False, cp_group: Any = None) -> Tensor:
        """Return cosines and sines side by side, [s, 1, 1, 2 x rotary_dim], of each of `ropes` after the other.

        max_seq_len: the longest text; the other arguments are the engine's.
        """
        assert not offset and not packed_seq, "rows are described by RowParams"
        table = self._table(max_seq_len)
        if self.positions is not None:
            return table.index_select(0, self.positions)
        group = self.cp_group if cp_group is None else cp_group
        shared = group is not None and group.size() > 1
        return get_pos_emb_on_this_cp_rank(table[:max_seq_len], 0, group) if shared else table[:max_seq_len]

    def _table(self, length: int) -> Tensor:
        """Return [at least length, 1, 1, 2 x rotary_dim x ropes]. A longer table begins like a shorter one, unless frequencies depend
        on the length.
        """
        known = self._tables.get(length) if self._by_length else next(iter(self._tables.values()), None)
        if known is None or len(known) < length:
            if not self._by_length or len(self._tables) == _TABLES:
                self._tables.clear()
            known = self._tables[length] = self._made(length if self._by_length else max(length, self.least))
        return known

    def _made(self, length: int) -> Tensor:
        here, parts = device.current_device(), []
        for rope in self.ropes:
            frequencies = inverse_frequencies(
                rope.dim, rope.theta, rope.scaling, self.arch.max_position_embeddings, length
            ).to(here)
            angles = torch.outer(torch.arange(length, device=here, dtype=torch.float32), frequencies)
            angles = torch.cat([angles, angles], dim=-1)[:, None, None]
            parts += [torch.cos(angles), torch.sin(angles)]
        return torch.cat(parts, dim=-1).to(self.dtype)


def ropes_of(arch: Architecture) -> list[Rope]:
    """Return the different rotary embeddings of a model's layers, that of layers without a window first."""
    parts = [arch.layer(number).attention for number in range(arch.num_layers)]
    parts.sort(key=lambda part: part.window is not None)
    found: list[Rope] = []
    for part in parts:
        if part.rope not in found:
            found.append(part.rope)
    return found


def turn(
    x: Tensor, table: Tensor, config: Any, cu_seqlens: Any = None, mscale: float = 1.0, cp_group: Any = None
) -> Tensor:
    """Return x [s, b, n, d] turned by its positions. In the place of the engine's apply_rotary_pos_emb, whose arguments it takes.

    table: cosines and sines as Rotary gives them, [s, 1, 1, 2 x r]; the first r of d are turned. config.apply_rope_fusion: by one
    compiled kernel.
    """
    cos, sin = table.to(x.dtype).chunk(2, dim=-1)
    function = _compiled() if config.apply_rope_fusion else _turned
    if cos.shape[-1] == x.shape[-1]:
        return function(x, cos, sin)
    first, rest = x.split([cos.shape[-1], x.shape[-1] - cos.shape[-1]], dim=-1)
    return torch.cat([function(first, cos, sin), rest], dim=-1)


def _turned(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    first, second = x.chunk(2, dim=-1)
    return x * cos + torch.cat((-second, first), dim=-1) * sin


@functools.cache
def _compiled() -> Callable[..., Tensor]:
    return torch.compile(_turned, dynamic=True)


@patch("0.16 to 0.19", "megatron.core.transformer.attention:apply_rotary_pos_emb")
def turn_by_table() -> None:
    """Make the engine's attention rotate queries and keys by `turn`. Idempotent.

    The engine's function takes angles and computes their cosine and sine in every layer; no setting replaces it.
    """
    attention.apply_rotary_pos_emb = turn
