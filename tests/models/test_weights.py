"""The rules as data: total, consistent in their shapes, and inverse in both directions for every cut."""

import pytest
import torch

from megatron_ft.models.architecture import Architecture, check_layout, padded_vocab_size
from megatron_ft.models.families import FAMILIES, family_of
from megatron_ft.models.weights import layers_of_stage, placed_rules

SIZES = {
    "num_layers": 4,
    "hidden_size": 16,
    "ffn_hidden_size": 24,
    "num_attention_heads": 8,
    "num_query_groups": 4,
    "head_dim": 6,
    "vocab_size": 37,
    "max_position_embeddings": 64,
    "norm_epsilon": 1e-5,
}


KINDS = {
    "llama": {},
    "mistral": {"sliding_window": 8},
    "qwen2": {"qkv_bias": True},
    "qwen3": {"qk_norm": True},
    "falcon": {"norm": "layernorm", "activation": "gelu", "parallel_block": True},
}


@pytest.fixture(params=[(family, tied) for family in FAMILIES for tied in (False, True)], ids=str)
def arch(request):
    family, tied = request.param
    return Architecture(family=family, tied_embeddings=tied, **KINDS[family], **SIZES)


def numbered(shape):
    """A tensor in which no two entries are alike."""
    size = torch.Size(shape)
    return torch.arange(size.numel(), dtype=torch.float32).reshape(size)


def test_both_directions_are_inverse(arch):
    for placed in placed_rules(arch, family_of(arch).rules(arch)):
        rule = placed.rule
        tensors = [numbered(shape) + 1000 * i for i, shape in enumerate(rule.hf_shapes(arch))]
        full = rule.to_megatron(arch, tensors)
        assert tuple(full.shape) == rule.full_shape(arch)
        assert len(placed.hf_keys) == len(tensors)
        assert all(torch.equal(a, b) for a, b in zip(rule.to_hf(arch, full), tensors, strict=True))


@pytest.mark.parametrize("tp_size", [1, 2, 4])
def test_split_and_join_are_inverse(arch, tp_size):
    padded = padded_vocab_size(arch.vocab_size, tp_size, multiple=8)
    for placed in placed_rules(arch, family_of(arch).rules(arch)):
        full = numbered(placed.rule.full_shape(arch))
        parts = placed.rule.split(arch, full, tp_size, padded)
        assert {tuple(part.shape) for part in parts} == {placed.rule.part_shape(arch, tp_size, padded)}
        assert torch.equal(placed.rule.join(arch, parts), full)


@pytest.mark.parametrize("pp_size", [1, 2, 4])
def test_stages_hold_everything_once(arch, pp_size):
    rules = family_of(arch).rules(arch)
    whole = [placed.key for placed in placed_rules(arch, rules)]
    staged = [list(placed_rules(arch, rules, pp_size, rank)) for rank in range(pp_size)]
    assert [placed.key for stage in staged for placed in stage if not placed.is_copy] == whole
    for stage in staged:
        assert len({placed.local_key for placed in stage}) == len(stage)
    copies = [placed.local_key for placed in staged[-1] if placed.is_copy]
    assert copies == (["output_layer.weight"] if arch.tied_embeddings and pp_size > 1 else [])


def test_query_rows_stay_with_their_group():
    """Two groups of two query heads, head_dim 1: megatron's rows are q q k v, q q k v."""
    arch = Architecture(
        family="llama", **{**SIZES, "num_attention_heads": 4, "num_query_groups": 2, "head_dim": 1, "hidden_size": 1}
    )
    rule = next(rule for rule in family_of(arch).rules(arch) if "qkv" in rule.key)
    q, k, v = torch.tensor([[1.0], [2], [3], [4]]), torch.tensor([[10.0], [20]]), torch.tensor([[100.0], [200]])
    assert rule.to_megatron(arch, [q, k, v]).flatten().tolist() == [1, 2, 10, 100, 3, 4, 20, 200]


def test_gate_and_up_are_cut_apart():
    arch = Architecture(family="llama", **{**SIZES, "ffn_hidden_size": 4, "hidden_size": 1})
    rule = next(rule for rule in family_of(arch).rules(arch) if "fc1" in rule.key)
    full = rule.to_megatron(arch, [torch.tensor([[1.0], [2], [3], [4]]), torch.tensor([[5.0], [6], [7], [8]])])
    assert [part.flatten().tolist() for part in rule.split(arch, full, 2)] == [[1, 2, 5, 6], [3, 4, 7, 8]]


@pytest.mark.parametrize("size, tp, rows", [(32007, 1, 32128), (32007, 8, 32768), (32000, 1, 32000), (65024, 8, 65536)])
def test_padded_vocabulary(size, tp, rows):
    assert padded_vocab_size(size, tp) == rows


def test_layers_of_stage():
    assert [list(layers_of_stage(6, 3, rank)) for rank in range(3)] == [[0, 1], [2, 3], [4, 5]]


def test_a_layout_that_divides_is_accepted(arch):
    for tp, pp in ((1, 1), (2, 2), (4, 4)):
        check_layout(arch, tp, pp)
