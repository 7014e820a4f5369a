"""Sampling of the next token from logits: pure functions of logits and a random generator."""

from __future__ import annotations

from dataclasses import dataclass

import torch


@dataclass(frozen=True)
class Sampling:
    """Sampling parameters. temperature 0 is greedy; top_k 0, top_p 1 and repetition_penalty 1 turn these off."""

    temperature: float = 0.0
    top_k: int = 0
    top_p: float = 1.0
    repetition_penalty: float = 1.0


GREEDY = Sampling()


def choose(
    logits: torch.Tensor, sampling: Sampling, generator: torch.Generator | None = None, seen: torch.Tensor | None = None
) -> torch.Tensor:
    """Return the sampled ids [b] for logits [b, v]. seen: the ids of each sequence so far [b, n], which a repetition penalty needs."""
    if sampling.repetition_penalty != 1 and seen is not None:
        logits = _penalise(logits.float(), seen, sampling.repetition_penalty)
    if sampling.temperature == 0:
        return logits.argmax(-1)
    scaled = logits.float() / sampling.temperature
    if sampling.top_k:
        scaled = _keep_top_k(scaled, min(sampling.top_k, logits.shape[-1]))
    if sampling.top_p < 1:
        scaled = _keep_top_p(scaled, sampling.top_p)
    return torch.multinomial(scaled.softmax(-1), 1, generator=generator)[:, 0]


def _penalise(logits: torch.Tensor, seen: torch.Tensor, penalty: float) -> torch.Tensor:
    """Divide the logits of seen tokens by the penalty, negative ones multiply (CTRL, Keskar et al. 2019), as transformers does."""
    found = logits.gather(1, seen)
    return logits.scatter(1, seen, torch.where(found < 0, found * penalty, found / penalty))


def _keep_top_k(logits: torch.Tensor, k: int) -> torch.Tensor:
    return logits.masked_fill(logits < logits.topk(k).values[:, -1:], -torch.inf)


def _keep_top_p(logits: torch.Tensor, p: float) -> torch.Tensor:
    """Mask all but the fewest most likely tokens whose probabilities sum to p or more (nucleus sampling, Holtzman et al. 2019)."""
    ordered, index = logits.sort(descending=True)
    probabilities = ordered.softmax(-1)
    beyond = probabilities.cumsum(-1) - probabilities >= p
    return torch.empty_like(logits).scatter_(-1, index, ordered.masked_fill(beyond, -torch.inf))
