"""Our model against transformers: the same logits in every layout and from every checkpoint format."""

import numpy as np
import pytest
import torch

from tests.parallel.jobs import VOCAB, logits, make_llama, to_checkpoint

LAYOUTS = [(4, 1), (1, 4), (2, 2), (2, 1), (1, 1)]


@pytest.fixture(scope="module")
def tokens():
    return np.random.default_rng(3).integers(0, VOCAB, (2, 48))


@pytest.fixture(scope="module")
def expected(llama, tokens):
    return hf_logits(llama, tokens)


def hf_logits(folder, tokens) -> np.ndarray:
    from transformers import LlamaForCausalLM

    with torch.no_grad():
        return LlamaForCausalLM.from_pretrained(folder, dtype=torch.float32)(torch.from_numpy(tokens)).logits.numpy()


@pytest.mark.parametrize("layout", LAYOUTS, ids=["TP4", "PP4", "TP2xPP2", "TP2xDP2", "DP4"])
@pytest.mark.parametrize("sequence_parallel", [False, True], ids=["", "sp"])
def test_torch_dist_in_every_layout(layout, sequence_parallel, four_ranks, checkpoint, tokens, expected):
    ours = [x for x in four_ranks.run(logits, checkpoint, layout, sequence_parallel, tokens) if x is not None]
    assert ours
    for rank in ours:
        np.testing.assert_allclose(rank, expected, atol=1e-4)


@pytest.mark.parametrize("layout", [(4, 1), (1, 4), (2, 2)], ids=["TP4", "PP4", "TP2xPP2"])
@pytest.mark.works("classic checkpoints", ["TP", "PP"])
def test_classic_in_its_layout(layout, four_ranks, llama, tokens, expected, tmp_path):
    root = to_checkpoint(llama, tmp_path / "classic", "torch", *layout)
    ours = [x for x in four_ranks.run(logits, root, layout, True, tokens) if x is not None]
    for rank in ours:
        np.testing.assert_allclose(rank, expected, atol=1e-4)


VARIANTS = {
    "tied": {"tie_word_embeddings": True},
    "llama3 rope": {
        "rope_parameters": {
            "rope_type": "llama3", "rope_theta": 5e5, "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0,
            "original_max_position_embeddings": 32,
        }
    },
    "linear rope": {"rope_parameters": {"rope_type": "linear", "rope_theta": 1e4, "factor": 4.0}},
    "head_dim 24": {"head_dim": 24},
    "multi-head": {"num_key_value_heads": 8},
}  # fmt: skip


@pytest.mark.parametrize("variant", VARIANTS)
@pytest.mark.works(["RoPE scaling", "tied embeddings"], "SP", "PP")
def test_variants_of_llama(variant, four_ranks, tokens, tmp_path):
    """Tied embeddings, scaled rope, odd head sizes: TP2 x PP2 against transformers."""
    hf = make_llama(tmp_path / "hf", **VARIANTS[variant])
    root = to_checkpoint(hf, tmp_path / "megatron", "torch_dist", 1, 1)
    ours = [x for x in four_ranks.run(logits, root, (2, 2), True, tokens) if x is not None]
    np.testing.assert_allclose(ours[0], hf_logits(hf, tokens), atol=1e-4)
