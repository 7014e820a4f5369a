"""Linears over NF4 in every layout: the numbers of one process with plain linears and dequantised weights."""

import dataclasses

import pytest
import torch

from megatron_ft.models.architecture import Architecture
from megatron_ft.models.trainable import Trainable
from tests.quantization import jobs
from tests.ranks import Ranks

LLAMA = Architecture(
    family="llama", num_layers=4, hidden_size=128, ffn_hidden_size=256, num_attention_heads=8, num_query_groups=4,
    head_dim=32, vocab_size=203, max_position_embeddings=256, norm_epsilon=1e-5,
)  # fmt: skip
FALCON = dataclasses.replace(
    LLAMA, family="falcon", norm="layernorm", activation="gelu", parallel_block=True, tied_embeddings=True
)
QWEN = dataclasses.replace(LLAMA, family="qwen3", qkv_bias=True, qk_norm=True, tied_embeddings=True, activation="geglu")
REST = Trainable(("norm", "embedding", "output_layer"))
"""What is left to train; its gradients pass through every frozen linear."""
TOLERANCE = 2e-5


@pytest.fixture(scope="module")
def pools(one_rank, four_ranks):
    two = Ranks(2)
    yield {1: one_rank, 2: two, 4: four_ranks}
    two.close()


def measured(pools, arch, cases, prepare, **numerics):
    """Case name -> measured. Cases of the same size in one go."""
    from megatron_ft.config.sections import Numerics
    from megatron_ft.training.invariance import Problem

    problem, found = Problem(arch, numerics=Numerics(**numerics), trainable=REST), {}
    for size in {case.processes for case in cases}:
        here = [case for case in cases if case.processes == size]
        found |= {
            case.name: one
            for case, one in zip(here, pools[size].run(jobs.measured, problem, here, prepare)[0], strict=True)
        }
    return found


def cases_of(*names):
    from megatron_ft.commands.verify_invariance import cases_for

    found = [
        case for case in cases_for(LLAMA) if case.packing and not case.broken and (not names or case.name in names)
    ]
    assert len(found) == len(names or found) > 0
    return found


def one_process():
    from megatron_ft.training.invariance import Case

    return Case("one", 1)


@pytest.mark.parametrize("arch", [LLAMA, FALCON, QWEN], ids=["llama", "falcon", "qwen3"])
def test_one_process_is_bit_equal_to_plain_linears(pools, arch):
    from megatron_ft.training.invariance import compare

    for numerics in ({}, {"recompute_granularity": "full"}):
        plain = measured(pools, arch, [one_process()], jobs.dequantise_in_place, **numerics)["one"]
        frozen = measured(pools, arch, [one_process()], jobs.freeze, **numerics)["one"]
        assert compare(plain, frozen).largest == 0
        linears = ("linear_qkv.weight", "linear_proj.weight", "linear_fc1.weight", "linear_fc2.weight")
        assert not any(name.endswith(linears) for name in frozen.gradients) and len(frozen.gradients) > 5
        assert all(abs(value).max() > 0 for value in frozen.gradients.values())


QUICK = ("TP2", "TP4 + sequence parallel", "PP4", "PP2, interleaved", "TP2 x PP2 + sequence parallel", "DP2")


@pytest.mark.parametrize("names", [QUICK, pytest.param((), marks=pytest.mark.thorough)], ids=["some", "all"])
def test_every_layout_computes_the_same(pools, names):
    from megatron_ft.training.invariance import compare

    reference = measured(pools, LLAMA, [one_process()], jobs.dequantise_in_place)["one"]
    cases = cases_of(*names)
    assert len(cases) == len(names or range(13))
    apart = {name: compare(reference, one) for name, one in measured(pools, LLAMA, cases, jobs.freeze).items()}
    assert all(found.largest < TOLERANCE for found in apart.values()), apart


@pytest.mark.parametrize("arch", [FALCON, QWEN], ids=["falcon", "qwen3"])
def test_other_families_and_recomputation(pools, arch):
    from megatron_ft.training.invariance import compare

    reference = measured(pools, arch, [one_process()], jobs.dequantise_in_place)["one"]
    cases = cases_of("TP2 x PP2 + sequence parallel")
    found = measured(pools, arch, cases, jobs.freeze, recompute_granularity="full")
    assert all(compare(reference, one).largest < TOLERANCE for one in found.values())


def test_a_layout_is_bit_equal_to_plain_linears_in_the_same_layout(pools):
    from megatron_ft.training.invariance import compare

    cases = cases_of("TP2 x PP2 + sequence parallel")
    plain = measured(pools, LLAMA, cases, jobs.dequantise_in_place)
    found = measured(pools, LLAMA, cases, jobs.freeze)
    assert all(compare(plain[name], found[name]).largest == 0 for name in plain)


def test_one_wrong_scale_is_noticed(pools):
    from megatron_ft.training.invariance import compare

    reference = measured(pools, LLAMA, [one_process()], jobs.freeze)["one"]
    cases = cases_of("TP4 + sequence parallel")
    (found,) = measured(pools, LLAMA, cases, jobs.freeze_and_shift_last_rank).values()
    assert compare(reference, found).largest > 10 * TOLERANCE


def test_half_precision(pools):
    """Bit-equal to plain linears where this CPU has units for bf16; else products are computed in fp32, which rounds less."""
    from megatron_ft.quantization.frozen import _has_units
    from megatron_ft.training.invariance import compare

    plain = measured(pools, LLAMA, [one_process()], jobs.dequantise_in_place, bf16=True)["one"]
    frozen = measured(pools, LLAMA, [one_process()], jobs.freeze, bf16=True)["one"]
    assert compare(plain, frozen).loss < 1e-3
    assert compare(plain, frozen).largest == 0 or not _has_units(torch.bfloat16)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("has_units", [False, True])
def test_products_in_half_precision(pools, dtype, has_units, monkeypatch):
    from megatron_ft.quantization import frozen

    monkeypatch.setattr(frozen, "_has_units", lambda _: has_units)
    left, right = (torch.randn(8, 64, generator=torch.Generator().manual_seed(n)).to(dtype) for n in (1, 2))
    found, exact = frozen._multiply(left, right.t()), left.double() @ right.t().double()
    assert found.dtype == dtype
    torch.testing.assert_close(found.double(), exact, rtol=torch.finfo(dtype).eps, atol=torch.finfo(dtype).eps)


def test_what_is_kept(one_rank):
    """Codes and scales for the backward pass, no dense weight; scales stay in fp32 when the engine makes all of a model bf16."""
    kept, sizes, after, scale = one_rank.run(jobs.held_for_backward, LLAMA)[0]
    assert kept == {"torch.uint8": 512 * 64, "torch.float32": 4 * 512 * 2}
    assert sizes["decoder.layers.3.mlp.linear_fc1"] == [512, 64] and len(sizes) == 16
    assert after == {"weight": "torch.uint8", "weight_absmax": "torch.float32"}
    assert scale == pytest.approx(1 / 3, rel=1e-7)


def test_a_slice_that_is_not_made_of_blocks(pools):
    from tests.ranks import RankFailed

    arch = dataclasses.replace(LLAMA, ffn_hidden_size=192)
    with pytest.raises(RankFailed, match="fc2: a rank's 96 columns are no multiple of NF4's block of 64"):
        Ranks(2).run(jobs.measured, problem_of(arch), cases_of("TP2"), jobs.freeze)


def problem_of(arch):
    from megatron_ft.training.invariance import Problem

    return Problem(arch, trainable=REST)
