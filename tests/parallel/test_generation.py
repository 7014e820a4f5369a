"""Decoding against transformers' own, in every layout."""

import numpy as np
import pytest
import torch

from megatron_ft.generation.sampling import Sampling
from tests.parallel.jobs import VOCAB, generate

LENGTHS = (5, 9, 5, 17, 30)


@pytest.fixture(scope="module")
def prompts():
    rng = np.random.default_rng(5)
    return [rng.integers(0, VOCAB, length) for length in LENGTHS]


@pytest.fixture(scope="module")
def expected(llama, prompts):
    """transformers' greedy continuation of each prompt, 20 tokens."""
    from transformers import LlamaForCausalLM

    model = LlamaForCausalLM.from_pretrained(llama, dtype=torch.float32)
    model.generation_config.eos_token_id = None
    ids = [torch.from_numpy(prompt)[None] for prompt in prompts]
    # Without a mask of ones, transformers would take token 0 in a prompt for padding.
    options = {"max_new_tokens": 20, "do_sample": False, "pad_token_id": 0}
    answers = [model.generate(x, attention_mask=torch.ones_like(x), **options) for x in ids]
    return [answer[0, x.shape[1] :].tolist() for answer, x in zip(answers, ids)]


@pytest.mark.parametrize("layout", [(4, 1), (1, 4), (2, 2), (2, 1)], ids=["TP4", "PP4", "TP2xPP2", "TP2xDP2"])
@pytest.mark.works("generate", ["TP", "PP", "DP"])
@pytest.mark.works("generate", "TP", ["PP", "DP"])
def test_greedy_equals_transformers(layout, four_ranks, checkpoint, prompts, expected):
    for answers in four_ranks.run(call, checkpoint, layout, prompts, {"max_new_tokens": 20}):
        assert answers == expected


def test_batches_of_any_size(one_rank, checkpoint, prompts, expected):
    for batch_size in (1, 2, 32):
        (answers,) = one_rank.run(call, checkpoint, (1, 1), prompts, {"max_new_tokens": 20, "batch_size": batch_size})
        assert answers == expected


def test_stops_before_the_stop_token(one_rank, checkpoint, prompts, expected):
    stop = expected[0][7]
    (answers,) = one_rank.run(call, checkpoint, (1, 1), prompts, {"max_new_tokens": 20, "stop_ids": (stop,)})
    cut = [row[: row.index(stop)] if stop in row else row for row in expected]
    assert answers == cut and len(answers[0]) <= 7


def test_sampling_is_seeded_and_agreed(four_ranks, checkpoint, prompts):
    """Every rank holds the same sampled text; another seed gives another."""
    options = {"max_new_tokens": 12, "sampling": Sampling(temperature=1.0, top_k=50, top_p=0.95)}
    first = four_ranks.run(call, checkpoint, (2, 2), prompts, options | {"seed": 1})
    again = four_ranks.run(call, checkpoint, (2, 2), prompts, options | {"seed": 1})
    other = four_ranks.run(call, checkpoint, (2, 2), prompts, options | {"seed": 2})
    assert all(row == first[0] for row in first + again)
    assert other[0] != first[0]


@pytest.mark.parametrize("layout", [(1, 1), (2, 2)], ids=["one", "TP2xPP2"])
def test_repetition_penalty_equals_transformers(layout, four_ranks, one_rank, llama, checkpoint, prompts):
    from transformers import LlamaForCausalLM

    model = LlamaForCausalLM.from_pretrained(llama, dtype=torch.float32)
    model.generation_config.eos_token_id = None
    options = {"max_new_tokens": 20, "do_sample": False, "pad_token_id": 0, "repetition_penalty": 1.4}
    ids = [torch.from_numpy(prompt)[None] for prompt in prompts]
    expected = [model.generate(x, attention_mask=torch.ones_like(x), **options)[0, x.shape[1] :].tolist() for x in ids]
    ranks = one_rank if layout == (1, 1) else four_ranks
    given = {"max_new_tokens": 20, "sampling": Sampling(repetition_penalty=1.4)}
    for answers in ranks.run(call, checkpoint, layout, prompts, given):
        assert answers == expected


def test_long_prompts_are_not_read_token_by_token(one_rank, checkpoint, prompts, expected):
    """With two new tokens, lengths 5, 5, 9, 17 and 30 are four batches of two steps each. The answers stay those of one batch."""
    ((passes, answers),) = one_rank.run(count_passes, checkpoint, prompts)
    assert passes == 8
    assert answers == [answer[:2] for answer in expected]


@pytest.mark.parametrize("layout", [(4, 1), (1, 4), (2, 2)], ids=["TP4", "PP4", "TP2xPP2"])
def test_the_cache_has_the_size_of_its_formula(layout, four_ranks, checkpoint, prompts):
    for held, formula in four_ranks.run(cache_bytes, checkpoint, layout, prompts[-1:]):
        assert held == formula > 0


def cache_bytes(checkpoint, layout, prompts):
    """Return the bytes of keys and values that a rank holds, and those of the formula by which a layout is chosen."""
    from megatron_ft.generation import decoding
    from megatron_ft.planner.answering import Reader
    from megatron_ft.planner.known import architecture

    made, real = [], decoding.StaticInferenceContext
    decoding.StaticInferenceContext = lambda *sizes: made.append(real(*sizes)) or made[-1]
    try:
        generate(checkpoint, layout, prompts, max_new_tokens=6)
    finally:
        decoding.StaticInferenceContext = real
    held = sum(tensor.nbytes for pair in made[-1].key_value_memory_dict.values() for tensor in pair)
    arch, (tp, pp) = architecture(str(checkpoint)), layout
    return held, Reader(arch, 4, len(prompts[0]) + 6).cache(tp, arch.num_layers // pp)


def count_passes(checkpoint, prompts):
    from megatron_ft.generation.decoding import Decoder

    passes, real = [], Decoder._forward

    def counted(self, *args):
        passes.append(1)
        return real(self, *args)

    Decoder._forward = counted
    try:
        answers = generate(checkpoint, (1, 1), prompts, max_new_tokens=2)
        return len(passes), answers
    finally:
        Decoder._forward = real


def call(checkpoint, layout, prompts, options):
    return generate(checkpoint, layout, prompts, **options)
