"""A frozen base: what is not trained has no gradient and keeps its bits, in every layout, through saves and stops."""

import dataclasses

import numpy as np
import pytest

from tests.parallel.jobs import finetune, read_metrics, to_hf
from tests.parallel.test_invariance import FALCON, LLAMA, TOLERANCE
from tests.ranks import Ranks

UPPER = ("layers.(2|3).mlp", "final_layernorm")
"""Of four layers the upper two: with PP2 or PP4 the first stage trains nothing."""


@pytest.fixture(scope="module")
def pools(one_rank, four_ranks):
    two = Ranks(2)
    yield {1: one_rank, 2: two, 4: four_ranks}
    two.close()


def measure(arch, case, patterns, numerics):
    from megatron_ft.models.trainable import Trainable
    from megatron_ft.training import invariance

    problem = invariance.Problem(arch, trainable=Trainable(patterns), numerics=numerics)
    return invariance.measure(problem, case)


@pytest.mark.parametrize(
    ("arch", "recompute"),
    [
        pytest.param(LLAMA, None, id="llama"),
        pytest.param(LLAMA, "full", id="llama, recomputed", marks=pytest.mark.thorough),
        pytest.param(FALCON, None, id="tied embeddings", marks=pytest.mark.thorough),
        pytest.param(FALCON, "full", id="tied embeddings, recomputed"),
    ],
)
@pytest.mark.works("chosen parameters", "dropout", "packing", ["SP", "PP", "VPP", "DP"])
@pytest.mark.works("chosen parameters", "recompute", ["Falcon", "tied embeddings"])
def test_gradients_of_what_is_trained_and_of_nothing_else(arch, recompute, pools):
    from megatron_ft.commands.verify_invariance import cases_for
    from megatron_ft.config.sections import Numerics
    from megatron_ft.training.invariance import Case, compare

    numerics = Numerics(hidden_dropout=0.2, recompute_granularity=recompute)
    (whole,) = pools[1].run(measure, arch, Case("one", 1), (), numerics)
    (reference,) = pools[1].run(measure, arch, Case("one", 1), UPPER, numerics)
    names = {name for name in whole.gradients if "layers.2.mlp" in name or "layers.3.mlp" in name or "final" in name}
    # A norm that precedes a linear is stored as that linear's, which is not its name in the model.
    names = {name for name in names if "layer_norm" not in name}
    assert reference.gradients.keys() == names and len(names) in (5, 6)
    assert reference.loss == whole.loss
    assert all(np.array_equal(reference.gradients[name], whole.gradients[name]) for name in names)
    assert 0 < reference.grad_norm < whole.grad_norm
    wanted = ("TP4 + sequence parallel", "PP4", "PP2, interleaved", "TP2 x PP2 + sequence parallel", "DP4")
    cases = [case for case in cases_for(arch) if case.name in wanted and case.packing]
    assert len(cases) == len(wanted)
    for case in cases:
        found = compare(reference, pools[case.processes].run(measure, arch, case, UPPER, numerics)[0])
        assert found.largest < TOLERANCE, (case.name, found)


@pytest.mark.parametrize(
    "flags",
    [{"bf16": True}, {"use_distributed_optimizer": True}, {"bf16": True, "ckpt_format": "torch"}],
    ids=["bf16", "distributed", "bf16, classic"],
)
@pytest.mark.works("chosen parameters", "resume", "SP", "PP", "dropout", ["bf16", "distributed optimizer"])
@pytest.mark.works("chosen parameters", "resume", "classic checkpoints", "bf16")
def test_a_run_that_is_stopped_and_resumed(flags, four_ranks, checkpoint, shards, tmp_path):
    """Only what is trained changes; the optimizer keeps nothing of the rest; a stop changes no bit."""
    for name, until in (("straight", (4,)), ("resumed", (2, 4))):
        for steps in until:
            load = checkpoint if steps == until[0] else str(tmp_path / name)
            four_ranks.run(train, load, shards, str(tmp_path / name), steps, flags)
    assert read_metrics(tmp_path / "straight") == read_metrics(tmp_path / "resumed")
    before, one, other = (
        to_hf(str(root), tmp_path / f"hf-{number}")
        for number, root in enumerate((checkpoint, tmp_path / "straight", tmp_path / "resumed"))
    )
    dtype = next(iter(one.values())).dtype
    changed = {name for name in one if not np.array_equal(as_numbers(one[name]), as_numbers(before[name].to(dtype)))}
    assert changed == {
        *(f"model.layers.{n}.mlp.{part}_proj.weight" for n in (2, 3) for part in ("gate", "up", "down")), "model.norm.weight",
    }  # fmt: skip
    assert all(np.array_equal(as_numbers(one[name]), as_numbers(other[name])) for name in one)
    if "ckpt_format" not in flags:
        assert optimizer_parameters(tmp_path / "straight") == 5


def as_numbers(tensor) -> np.ndarray:
    return tensor.float().numpy()


def train(load, shards, save, until, flags):
    finetune(
        (2, 2), load=load, data_path=[shards], save=save, report=False, train_iters=until, lr_decay_iters=10, hidden_dropout=0.1,
        unfrozen_parameters=list(UPPER), **flags,
    )  # fmt: skip


def optimizer_parameters(root) -> int:
    """Parameters of which the checkpoint keeps a first moment."""
    from megatron_ft.checkpoints.folder import find_checkpoint
    from megatron_ft.checkpoints.restricted import read_metadata

    names = read_metadata(find_checkpoint(root) / ".metadata").state_dict_metadata
    return len({name for name in names if ".exp_avg." in name and "exp_avg_sq" not in name})


def test_what_is_trained_can_be_saved_and_loaded_by_itself(four_ranks, checkpoint, tmp_path):
    """TP2 x PP2: only the trained weights are written; put over other weights they change nothing else."""
    before, found = zip(*four_ranks.run(save_and_load, checkpoint, str(tmp_path)), strict=True)
    for of_rank, loaded in zip(before, found, strict=True):
        assert of_rank.keys() == loaded.keys()
        assert {name for name in loaded if loaded[name] != 0} == {name for name in loaded if trained(name)}
        assert all(loaded[name] == of_rank[name] for name in loaded if trained(name))
    assert sum(any(trained(name) for name in of_rank) for of_rank in before) == 2  # the first stage trains nothing


def trained(name: str) -> bool:
    from megatron_ft.models.trainable import Trainable

    return name in Trainable(UPPER)


def save_and_load(root, folder):
    """Return the sum of the magnitudes of each parameter, as loaded from the checkpoint, and after all became 0 and what is trained was
    loaded from what was saved of it.
    """
    from pathlib import Path

    import torch
    from megatron.core import dist_checkpointing

    from megatron_ft.checkpoints.folder import describe, find_checkpoint
    from megatron_ft.checkpoints.load import fill_chunks, load_weights, sharded_weights
    from megatron_ft.engine.parallel import ParallelSizes, process_groups
    from megatron_ft.models.build import build_model
    from megatron_ft.models.trainable import Trainable, named_parameters

    def sums():
        return {name: float(parameter.detach().abs().sum()) for name, parameter in named_parameters(model)}

    only, source = Trainable(UPPER), find_checkpoint(Path(root))
    with process_groups(ParallelSizes(2, 2)) as layout, torch.no_grad():
        model = build_model(describe(source).architecture, layout)
        load_weights(source, describe(source), model, layout)
        before = sums()
        dist_checkpointing.save({"model": sharded_weights(model, only)}, folder)
        for parameter in model.parameters():
            parameter.zero_()
        state = dist_checkpointing.load({"model": sharded_weights(model, only)}, folder)
        fill_chunks(model, state.get("model", {}), Path(folder), only)
        return before, sums()


def test_names_are_those_of_the_checkpoint():
    from megatron_ft.models.families import family_of
    from megatron_ft.models.trainable import Trainable
    from megatron_ft.models.weights import placed_rules

    names = [placed.key for placed in placed_rules(LLAMA, family_of(LLAMA).rules(LLAMA))]
    assert sum(name in Trainable(UPPER) for name in names) == 5
    assert sum(name in Trainable() for name in names) == len(names)
    assert not any(name in Trainable(("layers.4",)) for name in names)
    assert dataclasses.replace(Trainable(UPPER), patterns=()) == Trainable()
