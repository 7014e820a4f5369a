"""Every layout against one process: the loss, the gradient norm, the loss after an update and every gradient, compared by name."""

import dataclasses
import json
import os

import pytest

from megatron_ft.models.architecture import Architecture
from tests.errors.conftest import engine_desk
from tests.ranks import Ranks

LLAMA = Architecture(
    family="llama", num_layers=4, hidden_size=64, ffn_hidden_size=160, num_attention_heads=8, num_query_groups=4,
    head_dim=8, vocab_size=203, max_position_embeddings=256, norm_epsilon=1e-5,
)  # fmt: skip
FALCON = dataclasses.replace(
    LLAMA, family="falcon", norm="layernorm", activation="gelu", parallel_block=True, tied_embeddings=True
)
QWEN = dataclasses.replace(LLAMA, family="qwen3", qkv_bias=True, qk_norm=True, tied_embeddings=True, activation="geglu")
KINDS = {"ordinary block": LLAMA, "parallel block": FALCON, "biases, normed heads, tied": QWEN}
TOLERANCE = 2e-5


@pytest.fixture(scope="module")
def pools(one_rank, four_ranks):
    two = Ranks(2)
    yield {1: one_rank, 2: two, 4: four_ranks}
    two.close()


@pytest.mark.parametrize("packing", [True, pytest.param(False, marks=pytest.mark.thorough)], ids=["packed", "padded"])
@pytest.mark.parametrize("kind", ["ordinary block", pytest.param("parallel block", marks=pytest.mark.thorough)])
@pytest.mark.works(["TP", "PP", "VPP", "uneven stages", "DP"], ["packing", "padded rows"])
@pytest.mark.works("SP", ["PP", "DP"])
def test_every_layout_computes_the_same(kind, packing, pools):
    """TP2, TP4, PP2, PP4, interleaved, uneven, TP2 x PP2, DP2, DP4, sequence parallel, one row at once and two."""
    from megatron_ft.commands.verify_invariance import cases_for

    cases = [case for case in cases_for(KINDS[kind]) if case.packing == packing and not case.broken]
    assert len(cases) == 13
    apart = differences(pools, KINDS[kind], cases)
    assert all(found.largest < TOLERANCE for found in apart.values()), apart


@pytest.mark.parametrize("kind", ["parallel block", "biases, normed heads, tied"])
@pytest.mark.works(["Falcon", "Qwen3"], "tied embeddings", "packing", ["SP", "PP", "VPP"])
def test_other_kinds_of_model(kind, pools):
    """In a few layouts that between them split everything; `make test-all` takes the parallel block through all."""
    from megatron_ft.commands.verify_invariance import cases_for

    names = ("TP4 + sequence parallel", "PP2, interleaved", "TP2 x PP2 + sequence parallel")
    cases = [case for case in cases_for(KINDS[kind]) if case.name in names and case.packing]
    assert len(cases) == len(names)
    assert all(found.largest < TOLERANCE for found in differences(pools, KINDS[kind], cases).values())


def test_broken_layouts_are_noticed(pools):
    """Norms whose gradients are not summed; one rank whose weights are a little off; replicas that differ."""
    from megatron_ft.commands.verify_invariance import CAUGHT, cases_for
    from megatron_ft.config.sections import Parallelism
    from megatron_ft.training.invariance import Case, compare

    (norms,) = [case for case in cases_for(LLAMA) if case.name == CAUGHT]
    assert differences(pools, LLAMA, [norms])[CAUGHT].gradient > 1e-2
    reference = measured(pools, LLAMA, Case("one", 1))
    for case in (
        Case("TP2", 2, Parallelism(2)),
        Case("PP2", 2, Parallelism(pipeline_model_parallel_size=2)),
        Case("DP2", 2),
    ):
        found = compare(reference, measured(pools, LLAMA, case, shift_last_rank))
        assert found.largest > 10 * TOLERANCE, (case.name, found)


def test_a_tensor_that_is_missing_is_noticed(pools):
    from megatron_ft.training.invariance import Case, compare

    one = measured(pools, LLAMA, Case("one", 1))
    assert len(one.gradients) == 3 + 6 * 4 and all(abs(value).max() > 0 for value in one.gradients.values())
    less = {name: value for name, value in one.gradients.items() if "layers.2.mlp.linear_fc2" not in name}
    assert compare(one, one).largest == 0
    assert "layers.2.mlp.linear_fc2" in compare(one, dataclasses.replace(one, gradients=less)).where


CONFIG = {
    "model_type": "llama", "hidden_size": 512, "intermediate_size": 1024, "num_hidden_layers": 6, "vocab_size": 5000,
    "num_attention_heads": 16, "num_key_value_heads": 2, "max_position_embeddings": 512, "rms_norm_eps": 1e-5,
}  # fmt: skip


def test_the_command(tmp_path):
    """Its exit code is 0 where all is alike and 2 where it is not; it says which layout and tensor."""
    (tmp_path / "config.json").write_text(json.dumps(CONFIG))
    good = command("--load", str(tmp_path), "--layouts", "TP2", "norms not summed (broken on purpose)")
    assert good.code == 0, good.err
    assert good.out.count(": pass\n") == 1 and good.out.count(": caught\n") == 1
    bad = command("--load", str(tmp_path), "--layouts", "TP2", "--tolerance", "1e-12")
    assert bad.code == 2 and "FAIL" in bad.out and "above --tolerance 1e-12: TP2:" in bad.err


def command(*flags):
    """What verify-invariance leaves, run on the desk that has imported the engine."""
    return engine_desk()("verify-invariance", *flags, patience=150)


def differences(pools, arch, cases):
    """Case name -> Difference from one process, each with the packing of its case."""
    from megatron_ft.training.invariance import Case, compare

    references = {p: measured(pools, arch, Case("one", 1, packing=p)) for p in {case.packing for case in cases}}
    return {case.name: compare(references[case.packing], measured(pools, arch, case)) for case in cases}


def measured(pools, arch, case, prepare=None):
    return pools[case.processes].run(measure, arch, case, prepare)[0]


def measure(arch, case, prepare):
    from megatron_ft.config.sections import Numerics
    from megatron_ft.training import invariance

    problem = invariance.Problem(arch, numerics=Numerics(hidden_dropout=0.2, lima_dropout=True))
    return invariance.measure(problem, case, prepare)


def shift_last_rank(chunks):
    """One matrix of the last rank one percent larger."""
    if os.environ["RANK"] == str(int(os.environ["WORLD_SIZE"]) - 1):
        chunks[-1].decoder.layers[-1].mlp.linear_fc2.weight.data.mul_(1.01)
