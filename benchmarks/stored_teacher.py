"""Gradient error and size of a stored teacher by k: the top k with a tail bucket, beside the whole distribution and two alternatives.

    python benchmarks/stored_teacher.py

Distributions like those of a language model, without one: Zipf priors, noise, and a few likely tokens, about 3 nats of entropy over
32,000 tokens; the student's logits are the teacher's plus noise. The gradient of the KL divergence on the student's logits is computed by
the code of training from rows as they are stored (fp16), and compared with that from the teacher's logits in fp64. Truncated: the tail is
left out; renormalised: the top k are made to sum to 1, against the student's whole vocabulary.
"""

from __future__ import annotations

import argparse

import numpy as np
import torch
from torch import Tensor

VOCAB, ROWS = 32_000, 256
KS = (8, 16, 32, 64, 128, 256)


class Alone:
    """A group of one rank."""

    def rank(self) -> int:
        return 0

    def size(self) -> int:
        return 1


def teacher_logits(stream: torch.Generator) -> Tensor:
    """Return logits [rows, vocabulary] in fp64."""
    prior = -0.35 * torch.log(torch.arange(1, VOCAB + 1.0))
    logits = torch.stack([prior[torch.randperm(VOCAB, generator=stream)] for _ in range(64)]).repeat(ROWS // 64, 1)
    logits = logits + torch.randn(ROWS, VOCAB, generator=stream)
    peaks = torch.randint(0, VOCAB, (ROWS, 20), generator=stream)
    return logits.scatter_add_(1, peaks, 8 * torch.rand(ROWS, 20, generator=stream) + 4).double()


def stored(log_p: Tensor, k: int) -> tuple[np.ndarray, Tensor]:
    """Return rows as megatron-ft score writes them, and the ids."""
    from megatron_ft.data.teacher_logits import row_type

    values, ids = log_p.topk(k)
    rows = np.zeros(len(log_p), row_type(k, VOCAB))
    rows["ids"], rows["log_probs"], rows["tail"] = ids.numpy(), values.numpy(), 1 - values.exp().sum(-1).numpy()
    return rows, ids


def gradient(student: Tensor, rows: np.ndarray) -> Tensor:
    """Return the gradient of the KL divergence on the student's logits, as training computes it."""
    from megatron_ft.models.distilled_loss import Mix, TopK, distilled_loss

    parts = (torch.from_numpy(rows[name].astype(kind)) for name, kind in (("ids", np.int64), ("log_probs", np.float16)))
    target = TopK.of(*parts, torch.from_numpy(rows["tail"].copy()))
    leaf = student.float()[:, None].requires_grad_()
    labels = torch.zeros(len(student), 1, dtype=torch.long)
    distilled_loss(leaf.clone(), labels, target, VOCAB, Alone(), Mix(ce_weight=0.0))[0].sum().backward()
    assert leaf.grad is not None
    return leaf.grad[:, 0].double()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--noise", type=float, default=0.3, help="of the student's logits")
    noise = parser.parse_args().noise
    from megatron_ft.engine.start import prepare_engine

    prepare_engine()
    torch.set_num_threads(1)
    stream = torch.Generator().manual_seed(0)
    log_p = teacher_logits(stream).log_softmax(-1)
    student = log_p + noise * torch.randn(ROWS, VOCAB, generator=stream).double()
    p, q = log_p.exp(), student.softmax(-1)
    whole = q - p
    print(
        f"entropy {-(p * log_p).sum(-1).mean():.2f} nats, KL {(p * (log_p - student.log_softmax(-1))).sum(-1).mean():.4f}"
    )
    print("| k | mass | bytes a token | tail bucket | truncated | renormalised |\n|---|---|---|---|---|---|")
    for k in KS:
        rows, ids = stored(log_p, k)
        known = torch.zeros_like(p).scatter_(1, ids, p.gather(1, ids))
        mass = known.sum(-1, keepdim=True)
        found = (gradient(student, rows), mass * q - known, q - known / mass)
        errors = [float((one - whole).norm() / whole.norm()) for one in found]
        print(f"| {k} | {mass.mean():.4f} | {rows.itemsize} | " + " | ".join(f"{error:.1%}" for error in errors) + " |")


if __name__ == "__main__":
    main()
