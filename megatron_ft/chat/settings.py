"""How models are asked, and what they give back. Without torch."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from megatron_ft.generation.answer import Answer

if TYPE_CHECKING:
    from megatron_ft.generation.sampling import Sampling


@dataclass(frozen=True)
class Settings:
    """How answers are drawn. stop: strings that an answer ends before."""

    max_new_tokens: int
    sampling: Sampling
    seed: int = 0
    stop: Sequence[str] = ()


@dataclass(frozen=True)
class Reply:
    """An answer, and how many messages at the beginning of the conversation the model did not read."""

    answer: Answer
    dropped: int
