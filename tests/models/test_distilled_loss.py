"""The distilled loss against torch's own functions in fp64: values and gradients, a teacher's logits and its stored top k."""

import pytest
import torch
from torch.nn import functional

A, B, VOCAB, PADDED = 0.7, 0.4, 240, 250


class Alone:
    """A group of one rank."""

    def rank(self):
        return 0

    def size(self):
        return 1


@pytest.fixture(params=[1.0, 2.0, 4.0])
def case(request, monkeypatch):
    """(temperature, student, teacher, labels, weights), in pieces of a few positions."""
    from megatron_ft.engine.start import prepare_engine

    prepare_engine()
    from megatron_ft.models import cross_entropy

    monkeypatch.setattr(cross_entropy, "CHUNK", 4 * PADDED * 7)
    stream = torch.Generator().manual_seed(0)
    student, teacher = (torch.randn(32, 3, PADDED, generator=stream) * 3 for _ in range(2))
    return request.param, student, teacher, torch.randint(0, VOCAB, (32, 3), generator=stream), torch.rand(
        32, 3, generator=stream
    )  # fmt: skip


def ours(student, labels, weights, target, temperature):
    """(cross entropy, KL, gradient)"""
    from megatron_ft.models.distilled_loss import Mix, distilled_loss

    leaf = student.clone().requires_grad_()
    found = distilled_loss(leaf.clone(), labels, target, VOCAB, Alone(), Mix(A, B, temperature))
    (found[0] * weights).sum().backward()
    return found[1].detach(), found[2].detach(), leaf.grad


def reference(student, labels, weights, kl_of, temperature):
    leaf = student[..., :VOCAB].double().requires_grad_()
    ce = functional.cross_entropy(leaf.flatten(0, 1), labels.flatten(), reduction="none").view(labels.shape)
    kl = kl_of((leaf / temperature).log_softmax(-1))
    ((A * ce + B * temperature**2 * kl) * weights).sum().backward()
    return ce.detach(), kl.detach(), leaf.grad


def check(found, expected):
    assert (found[0] - expected[0]).abs().max() < 2e-6
    for mine, theirs in zip(found[1:], (expected[1], expected[2]), strict=True):
        width = theirs.shape[-1]
        assert (mine[..., :width] - theirs).abs().max() < 2e-6 * theirs.abs().max().clamp(min=0.5)
    assert not found[2][..., VOCAB:].any()


def test_the_teachers_logits(case):
    from megatron_ft.models.distilled_loss import Logits

    temperature, student, teacher, labels, weights = case
    log_p = (teacher[..., :VOCAB].double() / temperature).log_softmax(-1)
    expected = reference(
        student, labels, weights,
        lambda log_q: functional.kl_div(log_q, log_p, log_target=True, reduction="none").sum(-1), temperature,
    )  # fmt: skip
    check(ours(student, labels, weights, Logits.of(teacher), temperature), expected)


@pytest.mark.parametrize("k", [1, 8, VOCAB])
def test_the_stored_top_k(k, case):
    from megatron_ft.models.distilled_loss import TopK

    temperature, student, teacher, labels, weights = case
    log_p = (teacher[..., :VOCAB].double() / temperature).log_softmax(-1)
    known, ids = log_p.topk(k)
    others = torch.ones_like(log_p).scatter_(-1, ids, 0.0)
    tail = (log_p.exp() * others).sum(-1)

    def kl_of(log_q):
        whole = (known.exp() * (known - log_q.gather(-1, ids))).sum(-1)
        return whole if k == VOCAB else whole + tail * (tail / (log_q.exp() * others).sum(-1)).log()

    target = TopK.of(ids.flatten(0, 1), known.flatten(0, 1).float(), tail.flatten().float())
    check(ours(student, labels, weights, target, temperature), reference(student, labels, weights, kl_of, temperature))


def test_nothing_to_learn_from_oneself(case):
    from megatron_ft.models.distilled_loss import Logits, Mix, distilled_loss

    temperature, student, _, labels, _ = case
    leaf = student.clone().requires_grad_()
    found = distilled_loss(leaf.clone(), labels, Logits.of(student), VOCAB, Alone(), Mix(0.0, 1.0, temperature))
    found[0].sum().backward()
    assert not found[2].any() and not leaf.grad.any()


def test_the_gradient_is_in_the_memory_of_the_logits(case):
    from megatron_ft.models.distilled_loss import Logits, Mix, distilled_loss

    temperature, student, teacher, labels, _ = case
    leaf = student.clone().requires_grad_()
    logits = leaf.clone()
    logits.register_hook(lambda grad: places.append(grad.data_ptr()))
    places = []
    distilled_loss(logits, labels, Logits.of(teacher), VOCAB, Alone(), Mix(1.0, 1.0, temperature))[0].sum().backward()
    assert places == [logits.data_ptr()]
