"""Tokens per second of generation: those of prompts that are read at once, and those that are generated one by one."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from megatron_ft.wording import counted


@dataclass
class Throughput:
    """Sums over batches. A prompt's tokens beyond the shortest one's are read during the steps of the answers."""

    prompt_tokens: int = 0
    prompt_seconds: float = 0.0
    new_tokens: int = 0
    new_seconds: float = 0.0

    def add(
        self, is_first: bool, lengths: torch.Tensor, read: int, until: int, finished: torch.Tensor, seconds: float
    ) -> None:
        """Count one pass that read the positions from `read` to `until`, and chose a token for each answer that is not finished."""
        self.prompt_tokens += int((lengths.clamp(max=until) - read).clamp(min=0).sum())
        self.new_tokens += int(((lengths <= until) & ~finished).sum())
        if is_first:
            self.prompt_seconds += seconds
        else:
            self.new_seconds += seconds

    def __str__(self) -> str:
        whole = self.prompt_seconds + self.new_seconds
        text = f"{counted(self.prompt_tokens, 'token')} of prompts"
        if self.prompt_seconds:
            text += f" ({self.prompt_tokens / self.prompt_seconds:,.1f} tokens/s)"
        text += f", {self.new_tokens:,} new tokens"
        if self.new_seconds:
            text += f" ({self.new_tokens / self.new_seconds:,.1f} tokens/s)"
        return f"{text}, {whole:.1f} s"


def together(shares: list[Throughput]) -> Throughput:
    """Return the throughput of model replicas that worked at the same time: sums of tokens, the longest time."""
    return Throughput(
        sum(share.prompt_tokens for share in shares), max(share.prompt_seconds for share in shares),
        sum(share.new_tokens for share in shares), max(share.new_seconds for share in shares),
    )  # fmt: skip
