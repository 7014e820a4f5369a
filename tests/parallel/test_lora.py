"""LoRA adapters in every layout, against one process: the loss, the norm, every adapter's gradient and the loss after an update."""

import numpy as np
import pytest

from tests.parallel.test_invariance import FALCON, LLAMA, QWEN, TOLERANCE
from tests.ranks import Ranks


@pytest.fixture(scope="module")
def pools(one_rank, four_ranks):
    two = Ranks(2)
    yield {1: one_rank, 2: two, 4: four_ranks}
    two.close()


def lora_of(arch, targets=("all",), **more):
    from megatron_ft.adapters.spec import Lora, ordered

    return Lora(**({"rank": 4, "alpha": 2.0, "targets": ordered(targets, arch)} | more))


def measure(arch, case, lora, numerics, forget=None):
    """One case. forget: a mark of the adapters' parameters that is taken away, to break the layout."""
    from megatron_ft.training import invariance

    def without_mark(chunks):
        for chunk in chunks:
            for name, parameter in chunk.named_parameters():
                if "_lora." in name and getattr(parameter, forget, False):
                    setattr(parameter, forget, False)

    problem = invariance.Problem(arch, lora=lora, numerics=numerics)
    return invariance.measure(problem, case, without_mark if forget else None)


def cases(arch, names):
    from megatron_ft.commands.verify_invariance import cases_for

    found = [case for case in cases_for(arch) if case.name in names]
    assert len(found) == len(names)
    return found


LAYOUTS = (
    "TP2", "TP4 + sequence parallel", "PP4", "PP2, interleaved", "PP2, uneven", "TP2 x PP2 + sequence parallel", "DP2",
)  # fmt: skip


@pytest.mark.parametrize(
    ("arch", "targets", "numerics", "layouts"),
    [
        pytest.param(LLAMA, ("all",), {}, LAYOUTS, id="all"),
        pytest.param(
            FALCON, ("all",), {"recompute_granularity": "full"}, LAYOUTS[-2:], id="parallel block, recomputed"
        ),
        pytest.param(QWEN, ("q_proj", "v_proj", "fc1"), {}, ("TP4 + sequence parallel", "TP2"), id="q and v of three"),
    ],
)
@pytest.mark.works("LoRA", "dropout", "packing", ["SP", "PP", "VPP", "uneven stages", "DP"])
@pytest.mark.works("LoRA", "Falcon", "tied embeddings", "recompute", "dropout", ["SP", "PP", "DP"])
@pytest.mark.works("LoRA", "Qwen3", "SP")
def test_every_layout_trains_the_same_adapters(arch, targets, numerics, layouts, pools):
    from megatron_ft.config.sections import Numerics
    from megatron_ft.training.invariance import Case, compare

    lora, numerics = lora_of(arch, targets, dropout=0.1), Numerics(hidden_dropout=0.1, **numerics)
    (reference,) = pools[1].run(measure, arch, Case("one", 1), lora, numerics)
    assert {name.removeprefix("model.") for name in reference.gradients} == lora.shapes(arch).keys()
    assert all(abs(gradient).max() > 0 for gradient in reference.gradients.values())
    for case in cases(arch, layouts):
        found = compare(reference, pools[case.processes].run(measure, arch, case, lora, numerics)[0])
        assert found.largest < TOLERANCE, (case.name, found)


def test_without_a_mark_the_layout_is_noticed(pools):
    """The sequence-parallel mark of the whole part, and the tensor-parallel mark of the cut part, of which only the norm depends."""
    from megatron_ft.config.sections import Numerics
    from megatron_ft.training.invariance import Case, compare

    lora, numerics = lora_of(LLAMA), Numerics()
    (reference,) = pools[1].run(measure, LLAMA, Case("one", 1), lora, numerics)
    (case,) = cases(LLAMA, ("TP2 + sequence parallel",))
    whole, summed, counted = (
        compare(reference, pools[2].run(measure, LLAMA, case, lora, numerics, forget)[0])
        for forget in (None, "sequence_parallel", "tensor_model_parallel")
    )
    assert whole.largest < TOLERANCE
    assert summed.gradient > 1e-2 and summed.grad_norm > 1e-3
    assert counted.gradient < TOLERANCE and counted.grad_norm > 1e-3


FULL, PARTS = {"recompute_granularity": "full"}, {"recompute_modules": ["mlp", "layernorm"]}


@pytest.mark.parametrize(
    ("arch", "recompute"),
    [
        pytest.param(LLAMA, FULL, id="ordinary block, full", marks=pytest.mark.thorough),
        pytest.param(LLAMA, PARTS, id="ordinary block, parts"),
        pytest.param(FALCON, FULL, id="parallel block, full"),
        pytest.param(FALCON, PARTS, id="parallel block, parts", marks=pytest.mark.thorough),
    ],
)
@pytest.mark.works("LoRA", "recompute", "dropout", "SP", "PP")
def test_recomputation_changes_nothing(arch, recompute, pools):
    """Dropout too: the MLP of one microbatch runs again after the forward passes of the next ones (PP2)."""
    from megatron_ft.config.sections import Numerics
    from megatron_ft.training.invariance import compare

    lora, (case,) = lora_of(arch, dropout=0.3), cases(arch, ("TP2 x PP2 + sequence parallel",))
    recompute = {"recompute_granularity": "selective"} | recompute
    kept, again = (
        pools[4].run(measure, arch, case, lora, Numerics(**more, hidden_dropout=0.1))[0] for more in ({}, recompute)
    )
    assert compare(kept, again).largest < TOLERANCE  # the order of sums differs
    other = pools[4].run(measure, arch, case, lora_of(arch, dropout=0.31), Numerics(hidden_dropout=0.1))[0]
    assert compare(kept, other).gradient > 1e-2


def test_a_run_of_a_mask_drops_as_much_as_it_should():
    """Rows of a linear share no entry's mask with another linear, layer or token; parts of the channels are parts of the whole."""
    import torch

    from megatron_ft.models.dropout import dropped, token_keys

    keys = torch.from_numpy(token_keys(3, [0], 200).swapaxes(1, 2))
    x = torch.ones(200, 1, 256)
    one, other = dropped(x, keys, 1 << 20, 0.25), dropped(x, keys, (1 << 20) + 1, 0.25)
    assert abs(float((one == 0).float().mean()) - 0.25) < 0.01
    assert abs(float(((one == 0) & (other == 0)).float().mean()) - 0.0625) < 0.005
    halves = [dropped(x[..., :128], keys, 1 << 20, 0.25, first) for first in (0, 128)]
    assert torch.equal(torch.cat(halves, -1), one)
    assert np.isclose(float(one.max()), 4 / 3)


def test_the_command(tmp_path):
    """verify-invariance --lora_rank: every gradient in the table is an adapter's, and the broken layout is caught."""
    import json

    from tests.parallel.test_invariance import CONFIG, command

    (tmp_path / "config.json").write_text(json.dumps(CONFIG))
    flags = ("--load", str(tmp_path), "--layouts", "TP2 + sequence parallel", "norms not summed (broken on purpose)")
    good = command(*flags, "--lora_rank", "8", "--lora_dropout", "0.1")
    assert good.code == 0, good.err
    assert good.out.count(": pass\n") == 1 and good.out.count(": caught\n") == 1
    assert good.out.count("_lora.") == 2, good.out
    bad = command(*flags, "--lora_dropout", "0.1")
    assert bad.code == 2 and "add --lora_rank, or drop --lora_dropout" in bad.err


@pytest.mark.parametrize("arch", [LLAMA, FALCON], ids=["two tables", "tied"])
@pytest.mark.works("new tokens", "dropout", "packing", ["SP", "PP", "DP"])
@pytest.mark.works("new tokens", ["Falcon", "tied embeddings"], ["SP", "PP", "DP"])
def test_rows_of_new_tokens(arch, pools):
    """Their gradients, in tables that are cut, on one stage or on two, tied or not; others stay as they are."""
    from megatron_ft.config.sections import Numerics
    from megatron_ft.training.invariance import Case, compare

    tokens, numerics = (3, 60, 120, 202), Numerics(hidden_dropout=0.1)
    lora = lora_of(arch, ("qkv",), new_tokens=tokens)
    (reference,) = pools[1].run(measure, arch, Case("one", 1), lora, numerics)
    names = {name.removeprefix("model.") for name in reference.gradients}
    assert names == lora.shapes(arch).keys() and "embedding.word_embeddings_lora.rows" in names
    assert ("output_layer_lora.rows" in names) == (not arch.tied_embeddings)
    for name, gradient in reference.gradients.items():
        if name.endswith("_lora.rows"):
            assert gradient.shape == (4, 64) and (abs(gradient).max(1) > 0).sum() >= 2
    wanted = ("TP4 + sequence parallel", "TP2", "PP4", "TP2 x PP2 + sequence parallel", "DP2")
    for case in cases(arch, wanted):
        found = compare(reference, pools[case.processes].run(measure, arch, case, lora, numerics)[0])
        assert found.largest < TOLERANCE, (case.name, found)
