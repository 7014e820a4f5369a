"""The inputs of every layer besides activations: positions, boundaries of samples, dropout keys.

With the engine's packed format ("thd") each layer reads the boundaries back from the GPU to rotate queries and keys. Here rows stay in
its ordinary format ([s, b, h], a packed batch is one long row), and what depends on boundaries is computed once, before the layers.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from megatron.core.packed_seq_params import PackedSeqParams
from torch import Tensor


@dataclass
class RowParams(PackedSeqParams):
    """Handed on by the engine to every layer, also when it recomputes one. max_seqlen_q: the longest sample, for the rotary table."""

    keys: Tensor | None = None
    """[2, s, b] int32: a token's dropout key in two halves, for the positions of this rank; None: nothing is dropped."""
    all_keys: Tensor | None = None
    """The same for all positions, where sequence parallelism gives this rank some of them; None: `keys` has all."""
    positions: Tensor | None = None
    """[s] int64: the place of each token of a packed row within its sample; None: each row is one sample."""
    boundaries: Tensor | None = None
    """[k + 1] int32: where the samples of a packed row begin, and the end; None: each row is one sample."""
    lengths: tuple[int, ...] = ()
    """[k]: the lengths of those samples, known to the host."""


def one_sample_a_row(length: int, keys: Tensor | None = None, all_keys: Tensor | None = None) -> RowParams:
    """Describe rows of `length` positions that hold a sample each."""
    return RowParams("sbhd", max_seqlen_q=length, max_seqlen_kv=length, keys=keys, all_keys=all_keys)


def packed_rows(
    lengths: Sequence[int], positions: Tensor, boundaries: Tensor, keys: Tensor | None = None, all_keys: Tensor | None = None
) -> RowParams:  # fmt: skip
    """Describe a packed row. positions and boundaries: as `places` gives them, on the device."""
    longest = max(lengths)
    return RowParams(
        "sbhd", max_seqlen_q=longest, max_seqlen_kv=longest, keys=keys, all_keys=all_keys, positions=positions,
        boundaries=boundaries, lengths=tuple(lengths),
    )  # fmt: skip


def places(lengths: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Return (positions [s] int64, boundaries [k + 1] int32) of a row of samples with these lengths [k], laid end to end."""
    boundaries = np.concatenate([[0], np.cumsum(lengths)])
    positions = np.arange(boundaries[-1]) - np.repeat(boundaries[:-1], lengths)
    return positions.astype(np.int64), boundaries.astype(np.int32)


def packed_on(lengths: Sequence[int], where: torch.device) -> RowParams:
    """Return the same from lengths alone. Copies to the device and waits for it."""
    positions, boundaries = (torch.from_numpy(x).to(where) for x in places(np.asarray(lengths)))
    return packed_rows(lengths, positions, boundaries)
