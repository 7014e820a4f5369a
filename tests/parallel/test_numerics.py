"""fp16 and its loss scale, recomputation, gradients that are not finite on one rank, batches without a label, replicas that differ."""

import itertools
import os

import numpy as np
import pytest
import torch

from tests.parallel.jobs import finetune, read_metrics, to_hf
from tests.ranks import RankFailed, Ranks

FP16 = {"fp16": True, "initial_loss_scale": 2.0**18, "hysteresis": 1, "lr_warmup_iters": 0, "lr": 1e-3}


@pytest.mark.parametrize(
    "distributed_optimizer",
    [pytest.param(False, marks=pytest.mark.thorough), True],
    ids=["plain", "distributed-optimizer"],
)
@pytest.mark.works("fp16", "packing", "distributed optimizer", "SP", "PP")
def test_fp16_finds_its_scale_and_trains(distributed_optimizer, one_rank, four_ranks, checkpoint, shards, tmp_path):
    """Too high a scale overflows, halves, and costs steps that do not count as broken; then losses are those of fp32, nearly."""
    settings = FP16 | {"train_iters": 12, "max_skipped_iters": 1, "use_distributed_optimizer": distributed_optimizer}
    four_ranks.run(train, (2, 2), checkpoint, shards, str(tmp_path / "half"), settings)
    overflow, scale = (read_metrics(tmp_path / "half", f"train/{name}") for name in ("overflow", "loss_scale"))
    assert 3 < sum(overflow) < 10 and overflow == read_metrics(tmp_path / "half", "train/skipped")
    for before, after, halved in zip(scale, scale[1:], overflow):
        assert after == (before / 2 if halved else before)
    losses = [loss for loss, lost in zip(read_metrics(tmp_path / "half"), overflow) if not lost]
    assert losses[-1] < losses[0]
    fixed = {"train_iters": 4, "fp16": True, "loss_scale": scale[-1]}
    one_rank.run(train, (1, 1), checkpoint, shards, str(tmp_path / "fixed"), fixed)
    one_rank.run(train, (1, 1), checkpoint, shards, str(tmp_path / "full"), {"train_iters": 4})
    for name, tolerance in (("train/loss", 2e-3), ("train/grad_norm", 2e-2)):
        half, full = (read_metrics(tmp_path / run, name) for run in ("fixed", "full"))
        np.testing.assert_allclose(half, full, rtol=tolerance)


@pytest.mark.parametrize(
    "distributed_optimizer",
    [pytest.param(False, marks=pytest.mark.thorough), True],
    ids=["plain", "distributed-optimizer"],
)
@pytest.mark.works("fp16", "resume", "distributed optimizer", "SP", "DP")
def test_fp16_resumes_to_the_bit(distributed_optimizer, four_ranks, checkpoint, shards, tmp_path):
    """The scale, and how long it has held, come back: after the stop it rises in the same step as without one."""
    settings = FP16 | {
        "initial_loss_scale": 2.0**12,
        "lr_decay_iters": 10,
        "loss_scale_window": 3,
        "use_distributed_optimizer": distributed_optimizer,
    }
    for folder, load, until in (("straight", checkpoint, 10), ("run", checkpoint, 6), ("run", None, 10)):
        load = load or str(tmp_path / "run")
        four_ranks.run(
            train, (2, 1), load, shards, None, settings | {"save": str(tmp_path / folder), "train_iters": until}
        )
    assert read_metrics(tmp_path / "run") == read_metrics(tmp_path / "straight")
    scale = read_metrics(tmp_path / "run", "train/loss_scale")
    assert scale == read_metrics(tmp_path / "straight", "train/loss_scale")
    assert any(after == 2 * before for before, after in itertools.pairwise(scale[5:])), scale


@pytest.mark.parametrize(
    ("distributed_optimizer", "ckpt_format"),
    [
        (True, "torch_dist"),
        (False, "torch_dist"),
        pytest.param(True, "torch", marks=pytest.mark.thorough),
        pytest.param(False, "torch", marks=pytest.mark.thorough),
    ],
)
@pytest.mark.works("fp16", "resume", "classic checkpoints")
def test_fp16_is_saved_before_its_first_update(
    distributed_optimizer, ckpt_format, one_rank, four_ranks, checkpoint, shards, tmp_path
):
    """While the scale still falls, nothing has been updated and a stop is as likely as ever: it comes back, and goes on the same."""
    settings = FP16 | {
        "lr_decay_iters": 12, "use_distributed_optimizer": distributed_optimizer,
        "ckpt_format": ckpt_format, "max_skipped_iters": 100,
    }  # fmt: skip
    for folder, load, until in (("straight", checkpoint, 10), ("run", checkpoint, 2), ("run", None, 10)):
        load = load or str(tmp_path / "run")
        ranks, layout = (four_ranks, (2, 1)) if distributed_optimizer else (one_rank, (1, 1))
        ranks.run(train, layout, load, shards, None, settings | {"save": str(tmp_path / folder), "train_iters": until})
    skipped = read_metrics(tmp_path / "straight", "train/skipped")
    assert all(skipped[:3]) and not all(skipped)
    assert read_metrics(tmp_path / "run") == read_metrics(tmp_path / "straight")
    assert (
        read_metrics(tmp_path / "run", "train/grad_norm")[-1]
        == read_metrics(tmp_path / "straight", "train/grad_norm")[-1]
    )


def test_a_fixed_scale_that_overflows_is_broken(checkpoint, shards):
    ranks = Ranks(1)
    settings = {"fp16": True, "loss_scale": 2.0**40, "max_skipped_iters": 3}
    with pytest.raises(RankFailed, match="3 steps in a row had gradients that are not finite"):
        ranks.run(train, (1, 1), checkpoint, shards, None, settings)


RECOMPUTE = {
    "core_attn": {"recompute_granularity": "selective"},
    "mlp": {"recompute_granularity": "selective", "recompute_modules": ["mlp"]},
    "layernorm": {"recompute_granularity": "selective", "recompute_modules": ["layernorm"]},
    "all parts": {"recompute_granularity": "selective", "recompute_modules": ["core_attn", "mlp", "layernorm"]},
    "block": {"recompute_granularity": "full", "recompute_method": "block", "recompute_num_layers": 2},
    "uniform": {"recompute_granularity": "full", "recompute_num_layers": 2},
}


@pytest.mark.parametrize("kind", ["ordinary block", "parallel block", "one norm for both"])
@pytest.mark.works("recompute", "dropout", "packing", ["Falcon", "tied embeddings"])
def test_recomputing_changes_no_gradient_and_saves_memory(kind, one_rank):
    """Every gradient, dropout on, to the last bits; and what the forward pass keeps for the backward pass, in bytes."""
    plain, kept = one_rank.run(recomputed, kind, {})[0]
    bytes_kept = {}
    for name, settings in RECOMPUTE.items():
        measured, bytes_kept[name] = one_rank.run(recomputed, kind, settings)[0]
        assert measured.loss == plain.loss
        for key, gradient in plain.gradients.items():
            np.testing.assert_allclose(
                measured.gradients[key], gradient, rtol=1e-5, atol=1e-7, err_msg=f"{name}: {key}"
            )
    assert all(less < kept for name, less in bytes_kept.items() if name != "core_attn"), (kept, bytes_kept)
    assert bytes_kept["core_attn"] <= kept
    assert bytes_kept["uniform"] < bytes_kept["block"] < 0.7 * kept
    assert bytes_kept["all parts"] < min(bytes_kept[name] for name in ("mlp", "layernorm", "core_attn"))


POISONED = {"TP2xPP2": ((2, 2), 3), "DP4": ((1, 1), 2), "PP4": ((1, 4), 1)}
ALWAYS = {("TP2xPP2", "nan"), ("DP4", "inf"), ("PP4", "nan")}
"""Each layout and each value; the others are thorough."""


@pytest.mark.parametrize(
    ("layout", "rank", "value"),
    [
        pytest.param(*POISONED[name], float(value), id=f"{name}-{value}", marks=[pytest.mark.thorough] * ((name, value) not in ALWAYS))
        for name in POISONED for value in ("nan", "inf")
    ],
)  # fmt: skip
def test_not_finite_on_one_rank_updates_none(layout, rank, value, four_ranks, checkpoint, shards, tmp_path):
    """The second of two steps is poisoned on one rank: the weights saved are those after the first."""
    for poison in (None, rank):
        until = 1 if poison is None else 2
        save = str(tmp_path / str(poison))
        four_ranks.run(poisoned, layout, checkpoint, shards, save, until, poison, value)
    assert read_metrics(tmp_path / str(rank), "train/skipped") == [0, 1]
    clean, saved = (to_hf(str(tmp_path / str(poison)), tmp_path / f"hf{poison}") for poison in (None, rank))
    assert all(torch.equal(clean[name], saved[name]) for name in clean)


@pytest.mark.parametrize("layout", [(2, 2), pytest.param((1, 1), marks=pytest.mark.thorough)], ids=["TP2xPP2", "DP4"])
def test_a_batch_without_a_label_updates_nothing(layout, four_ranks, checkpoint, shards, tmp_path):
    """No 0/0: the loss is 0, the step is counted as empty, weights and Adam's state stay."""
    four_ranks.run(without_labels, layout, checkpoint, shards, str(tmp_path / "run"))
    assert read_metrics(tmp_path / "run", "train/empty") == [1, 1, 1] == read_metrics(tmp_path / "run", "train/skipped")
    assert read_metrics(tmp_path / "run") == [0.0] * 3 == read_metrics(tmp_path / "run", "train/grad_norm")
    before, after = to_hf(checkpoint, tmp_path / "a"), to_hf(str(tmp_path / "run"), tmp_path / "b")
    assert all(torch.equal(before[name], after[name]) for name in before)


def test_weights_below_one_in_all_divide_the_same(four_ranks, checkpoint, shards, tmp_path):
    """What is divided by is their sum, however small. megatron-core 0.19 by itself would divide by 1 at least."""
    for name in ("1", "1e-4"):
        settings = {"role_loss_weights": [f"assistant={name}"], "train_iters": 3}
        four_ranks.run(train, (2, 2), checkpoint, shards, str(tmp_path / name), settings)
    for metric in ("train/loss", "train/grad_norm"):
        one, small = (read_metrics(tmp_path / name, metric) for name in ("1", "1e-4"))
        assert len(one) == 3 and all(one)
        np.testing.assert_allclose(small, one, rtol=1e-4)


@pytest.mark.parametrize("layout", [(2, 1), pytest.param((1, 1), marks=pytest.mark.thorough)], ids=["TP2xDP2", "DP4"])
def test_a_replica_one_bit_off_is_flagged_within_k_steps(layout, checkpoint, shards, tmp_path):
    """A bit of rank 3's weights flips in step 2; replicas are compared every third step."""
    ranks = Ranks(4)
    odd = r"\[1, 3\] of \[1, 3\]" if layout == (2, 1) else r"\[3\] of \[0, 1, 2, 3\]"
    with pytest.raises(RankFailed, match=f"replicas differ after iteration 3: .*linear_fc2.weight on ranks? {odd}"):
        ranks.run(flip_a_bit, layout, checkpoint, shards, str(tmp_path))
    assert len(read_metrics(tmp_path)) == 3


def test_replicas_that_agree_are_left_alone(four_ranks, checkpoint, shards, tmp_path):
    settings = {"train_iters": 3, "check_replicas_every": 1, "use_distributed_optimizer": True, "bf16": True}
    for overlap in (False, True):
        more = {"overlap_param_gather": overlap, "overlap_grad_reduce": overlap, "save": str(tmp_path / str(overlap))}
        four_ranks.run(train, (1, 1), checkpoint, shards, None, settings | more)
    plain, overlapped = (to_hf(str(tmp_path / str(overlap)), tmp_path / f"hf{overlap}") for overlap in (False, True))
    assert all(torch.equal(plain[name], overlapped[name]) for name in plain)


def train(layout, load, shards, folder, settings):
    finetune(layout, load=load, data_path=[shards], run_dir=folder, report=False, **{"train_iters": 6} | settings)


def recomputed(kind, settings):
    """(what a step measured, bytes that one forward pass keeps)."""
    import dataclasses

    from megatron_ft.config.sections import Numerics
    from megatron_ft.training import invariance
    from tests.parallel.test_invariance import FALCON, LLAMA

    arch = LLAMA if kind == "ordinary block" else dataclasses.replace(FALCON, shared_norm=kind == "one norm for both")
    numerics = Numerics(hidden_dropout=0.2, lima_dropout=True, **settings)
    kept: dict[int, int] = {}

    def keep(tensor):
        storage = tensor.untyped_storage()
        kept[storage.data_ptr()] = storage.nbytes()
        return tensor

    def watch(chunks):
        forward = chunks[0].forward

        def watched(*args, **options):
            kept.clear()
            with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
                return forward(*args, **options)

        chunks[0].forward = watched

    measured = invariance.measure(invariance.Problem(arch, numerics=numerics), invariance.Case("one", 1), watch)
    return measured, sum(kept.values())


def poisoned(layout, load, shards, save, until, rank, value):
    """Train; in the second step one rank's gradients hold a value that is not finite."""
    from megatron_ft.training import step

    original, calls = step.update, []

    def update(optimizer):
        calls.append(1)
        if len(calls) == 2 and os.environ["RANK"] == str(rank):
            parameter = optimizer.get_parameters()[0]
            (parameter.main_grad if hasattr(parameter, "main_grad") else parameter.grad).flatten()[:1].fill_(value)
        return original(optimizer)

    step.update = update
    try:
        train(
            layout, load, shards, None, {"save": save, "train_iters": until, "lr_decay_iters": 4, "lr_warmup_iters": 0}
        )
    finally:
        step.update = original


def without_labels(layout, load, shards, save):
    """Every loss weight of every batch 0, as if only users spoke: the run ends with an error."""
    from megatron_ft.data.loader import ChatDataset
    from megatron_ft.training.stopping import MostlySkipped

    original = ChatDataset.microbatch

    def microbatch(self, rows, end=None):
        batch = original(self, rows, end)
        batch.weights[:] = 0
        return batch

    ChatDataset.microbatch = microbatch
    try:
        with pytest.raises(
            MostlySkipped, match=r"3 of 3 steps were skipped .* 3 without a token to train on: check the loss"
        ):
            train(layout, load, shards, None, {"save": save, "train_iters": 3, "max_skipped_iters": 1})
    finally:
        ChatDataset.microbatch = original


def flip_a_bit(layout, load, shards, folder):
    from megatron_ft.training import loop

    original, calls = loop._timed_step, []

    def timed_step(run, progress):
        metrics = original(run, progress)
        calls.append(1)
        if len(calls) == 2 and os.environ["RANK"] == "3":
            for name, parameter in run.stepper.model[0].named_parameters():
                if name.endswith("layers.1.mlp.linear_fc2.weight"):
                    parameter.data.view(torch.int32)[3, 5] ^= 1
        return metrics

    loop._timed_step = timed_step
    train(layout, load, shards, folder, {"check_replicas_every": 3, "lr": 1e-12, "weight_decay": 0.0})
