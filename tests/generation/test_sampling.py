"""Choosing tokens: greedy, and filters against transformers' own."""

import torch
from transformers import RepetitionPenaltyLogitsProcessor, TopKLogitsWarper, TopPLogitsWarper

from megatron_ft.generation.sampling import GREEDY, Sampling, _keep_top_k, _keep_top_p, _penalise, choose


def logits():
    return torch.randn(6, 50, generator=torch.Generator().manual_seed(0)) * 3


def test_greedy_takes_the_likeliest():
    assert torch.equal(choose(logits(), GREEDY), logits().argmax(-1))


def test_top_k_is_transformers():
    assert torch.equal(_keep_top_k(logits(), 7), TopKLogitsWarper(7)(None, logits()))


def test_top_p_is_transformers():
    for p in (0.1, 0.5, 0.9, 0.99):
        assert torch.equal(_keep_top_p(logits(), p), TopPLogitsWarper(p)(None, logits()))


def test_repetition_penalty_is_transformers():
    seen = torch.randint(0, 50, (6, 9), generator=torch.Generator().manual_seed(1))  # some ids more than once
    for penalty in (0.7, 1.3):
        expected = RepetitionPenaltyLogitsProcessor(penalty)(seen, logits())
        assert torch.equal(_penalise(logits(), seen, penalty), expected)
        assert torch.equal(choose(logits(), Sampling(repetition_penalty=penalty), seen=seen), expected.argmax(-1))


def test_samples_follow_the_probabilities():
    one = torch.tensor([[0.0, 1.0, 2.0, -1.0]])
    drawn = choose(one.expand(20000, 4), Sampling(temperature=0.7), torch.Generator().manual_seed(1))
    share = torch.bincount(drawn, minlength=4) / 20000
    torch.testing.assert_close(share, (one / 0.7).softmax(-1)[0], atol=0.015, rtol=0)


def test_a_low_temperature_is_nearly_greedy():
    drawn = choose(logits(), Sampling(temperature=1e-3), torch.Generator().manual_seed(1))
    assert torch.equal(drawn, logits().argmax(-1))
