"""Trains the predictor of a layer from inputs of its MLP.

It begins as the best low-rank approximation of what the matrix computes on these inputs (reduced-rank regression), which already has most
of the signs. A logistic regression of the signs improves it. The bias is then moved so that the wanted share of the active rows is found.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn.functional import binary_cross_entropy_with_logits

from megatron_ft.sparse.predictors import Thin

ROWS = 256
"""Tokens of a step."""
_AT_ONCE = 1024
"""Tokens whose scores are held at once."""


@dataclass(frozen=True)
class Fitting:
    """How predictors are trained."""

    rank: int
    recall: float
    steps: int = 300
    lr: float = 1e-3
    seed: int = 0


@dataclass(frozen=True)
class Quality:
    """Of a predictor on tokens that it was not trained with."""

    recall: float
    """share of the active rows that it finds"""
    weight: float
    """share of the sum of squares of the activations that it finds"""
    rows: float
    """share of all rows that it calls likely"""
    active: float
    """share of all rows that are active"""


def fit(matrix: Tensor, inputs: Tensor, how: Fitting) -> Thin:
    """Return the predictor of matrix [ffn, hidden] from inputs [n, hidden], both fp32."""
    with torch.no_grad():
        start = low_rank(matrix, inputs, how.rank)
    thin = _sign_regression(matrix, inputs, start, how)
    with torch.no_grad():
        return _with_recall(matrix, inputs, thin, how.recall)


def low_rank(matrix: Tensor, inputs: Tensor, rank: int) -> Thin:
    """Return the matrices of this rank with the least squared error of their product on the inputs."""
    mean = inputs.mean(0)
    centred = inputs - mean
    covariance = centred.t() @ centred / len(inputs)
    covariance += torch.eye(len(covariance)) * covariance.diagonal().mean().clamp(min=1e-12) * 1e-3
    root = torch.linalg.cholesky(covariance)
    _, vectors = torch.linalg.eigh((seen := matrix @ root).t() @ seen)
    kept = vectors[:, -rank:]
    high, low = seen @ kept, torch.linalg.solve_triangular(root, kept.t(), upper=False, left=False)
    return Thin(low, high, matrix @ mean - high @ (low @ mean))


def _sign_regression(matrix: Tensor, inputs: Tensor, start: Thin, how: Fitting) -> Thin:
    """Improve a predictor by gradient descent. Its scores are first scaled, as logits of what it is unsure of."""
    generator = torch.Generator().manual_seed(how.seed)
    with torch.no_grad():
        some = inputs[:_AT_ONCE]
        scale = 1 / (start.scores(some) - some @ matrix.t()).std().clamp(min=1e-6)
    parts = [part.clone().requires_grad_() for part in (start.low, start.high * scale, start.bias * scale)]
    optimizer = torch.optim.Adam([{"params": [part], "lr": how.lr * float(part.detach().std())} for part in parts])
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, max(1, how.steps))
    for _ in range(how.steps):
        rows = inputs[torch.randint(len(inputs), (ROWS,), generator=generator)]
        active = (rows @ matrix.t() > 0).float()
        optimizer.zero_grad()
        binary_cross_entropy_with_logits(Thin(*parts).scores(rows), active).backward()
        optimizer.step()
        schedule.step()
    return Thin(*(part.detach() for part in parts))


def _with_recall(matrix: Tensor, inputs: Tensor, thin: Thin, recall: float) -> Thin:
    """Move the bias so that a share `recall` of the active rows of the inputs is found."""
    found = [thin.scores(some)[some @ matrix.t() > 0] for some in inputs.split(_AT_ONCE)]
    scores = torch.cat(found).sort().values
    if not len(scores):
        return thin
    cut = scores[min(len(scores) - 1, int((1 - recall) * len(scores)))]
    return Thin(thin.low, thin.high, thin.bias - cut + cut.abs() * 1e-6)


@torch.no_grad()
def quality(matrix: Tensor, inputs: Tensor, thin: Thin) -> Quality:
    """Measure a predictor on inputs [n, hidden]."""
    found = active = likely = 0
    found_weight = weight = 0.0
    for some in inputs.split(_AT_ONCE):
        values, said = torch.relu(some @ matrix.t()), thin.scores(some) > 0
        found, active, likely = (
            found + int((said & (values > 0)).sum()),
            active + int((values > 0).sum()),
            likely + int(said.sum()),
        )
        found_weight, weight = (
            found_weight + float((values * said).square().sum()),
            weight + float(values.square().sum()),
        )
    total = len(inputs) * len(matrix)
    return Quality(found / max(1, active), found_weight / max(weight, 1e-30), likely / total, active / total)
