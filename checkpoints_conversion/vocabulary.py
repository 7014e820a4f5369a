"""Room for added tokens: which ids are new, and the rows they get in the embedding and the output layer."""

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
    """What new rows get beside the mean: normal, with this deviation, from this seed."""

    std: float
    seed: int

    def like(self, rows: int, width: int, name: str) -> Tensor:
        """[rows, width], fp32; embedding and output layer (by name) get their own."""
        import torch

        seed = int.from_bytes(hashlib.sha256(f"{self.seed} {name}".encode()).digest()[:7], "little")
        return torch.randn((rows, width), generator=torch.Generator().manual_seed(seed)) * self.std


@dataclass(frozen=True)
class Growth:
    """From the source's rows to rows for every token."""

    vocab_size: int
    """Rows after growing."""
    used_rows: int
    """Rows of the source that stand for a token; their mean is a new row's start."""
    new_ids: tuple[int, ...]
    """Tokens without a trained row: beyond the source's rows, or in rows that the source kept empty."""
    noise: Noise | None = None

    def apply(self, tensor: Tensor, name: str) -> Tensor:
        """[v, h] -> [vocab_size, h]; old rows unchanged, new ones the mean of the used ones (taken in fp32), plus noise.

        The mean as Hewitt (2021, "Initializing New Word Embeddings for Pretrained Language Models"): rows around zero would take
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
    """before: the source's tokenizer; after: the same with the added tokens. Without one, nothing grows."""
    rows = arch.vocab_size
    if before is None or after is None:
        return Growth(rows, rows, ())
    added = range(before.vocab_size, after.vocab_size)
    beyond = range(rows, after.vocab_size)  # a tokenizer may know tokens that the source never gave rows
    return Growth(max(rows, after.vocab_size), min(rows, before.vocab_size), tuple(sorted({*added, *beyond})), noise)


def parse_token_list(text: str | None) -> tuple[str, ...]:
    """A comma-separated list of tokens; one more pair of quotes inside, as some recipes print it, is dropped."""
    names = [name.strip() for name in (text or "").strip().strip("\"'").split(",")]
    if len(names) != len(set(names)):
        raise TokenizerError(f"--vocab_extra_ids_list {text}: a token is named twice")
    return tuple(name for name in names if name)


def union(*lists: Sequence[str]) -> tuple[str, ...]:
    """Every token once, in the order of first mention."""
    return tuple(dict.fromkeys(name for names in lists for name in names))
