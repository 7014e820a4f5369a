"""Added tokens: their ids, and their initial rows in the embedding and the output layer."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from megatron_ft.errors import TokenizerError
from megatron_ft.models.architecture import Architecture

if TYPE_CHECKING:
    from torch import Tensor

    from megatron_ft.data.tokenizer import Tokenizer


@dataclass(frozen=True)
class Noise:
    """Normal noise that is added to the mean in new rows."""

    std: float
    seed: int

    def like(self, rows: int, width: int, name: str) -> Tensor:
        """Return noise [rows, width] in fp32, different for embedding and output layer (by name)."""
        import torch

        seed = int.from_bytes(hashlib.sha256(f"{self.seed} {name}".encode()).digest()[:7], "little")
        return torch.randn((rows, width), generator=torch.Generator().manual_seed(seed)) * self.std


@dataclass(frozen=True)
class Growth:
    """The change from the source's rows to rows for every token."""

    vocab_size: int
    """Number of rows after the change."""
    used_rows: int
    """Number of the source's rows that are used by tokens; new rows start with their mean."""
    new_ids: tuple[int, ...]
    """Tokens without a trained row: beyond the source's rows, or in unused rows of the source."""
    noise: Noise | None = None

    def apply(self, tensor: Tensor, name: str) -> Tensor:
        """Return [vocab_size, h] from [v, h]: old rows unchanged, new ones the mean of the used ones (in fp32), plus noise.

        The mean follows Hewitt (2021, "Initializing New Word Embeddings for Pretrained Language Models"): rows near zero would take
        probability from every old token.
        """
        if not self.new_ids:
            return tensor
        grown = tensor.new_empty((self.vocab_size, tensor.shape[1]))
        grown[: tensor.shape[0]] = tensor
        start = tensor[: self.used_rows].float().mean(dim=0).expand(len(self.new_ids), -1)
        if self.noise:
            start = start + self.noise.like(start.shape[0], start.shape[1], name)
        grown[list(self.new_ids)] = start.to(tensor.dtype)
        return grown


def plan_growth(
    arch: Architecture, before: Tokenizer | None, after: Tokenizer | None, noise: Noise | None = None
) -> Growth:
    """Return the growth. before: the source's tokenizer. after: the same with added tokens. Without one, nothing changes."""
    rows = arch.vocab_size
    if before is None or after is None:
        return Growth(rows, rows, ())
    added = range(before.vocab_size, after.vocab_size)
    beyond = range(rows, after.vocab_size)  # a tokenizer may have tokens without rows in the source
    return Growth(max(rows, after.vocab_size), min(rows, before.vocab_size), tuple(sorted({*added, *beyond})), noise)


def parse_token_list(text: str | None) -> tuple[str, ...]:
    """Return the tokens of a comma-separated list, without an additional pair of quotes that some recipes have."""
    names = [name.strip() for name in (text or "").strip().strip("\"'").split(",")]
    if len(names) != len(set(names)):
        raise TokenizerError(f"--vocab_extra_ids_list {text}: a token occurs twice")
    return tuple(name for name in names if name)


def union(*lists: Sequence[str]) -> tuple[str, ...]:
    """Return every token once, in the order of its first occurrence."""
    return tuple(dict.fromkeys(name for names in lists for name in names))
