"""Ten steps are five, a checkpoint and five: to the bit on the same layout, in data and to 1e-5 in loss on another."""

import shutil

import numpy as np
import pytest
import torch

from megatron_ft import device
from tests.parallel.jobs import attempt, finetune, read_metrics, to_hf

CASES = {
    "TP2xDP2, distributed": ((2, 1), {"use_distributed_optimizer": True}, {}),
    "TP2xDP2, distributed, bf16, in the background": (
        (2, 1),
        {"use_distributed_optimizer": True, "bf16": True},
        {"async_save": True},
    ),
    "TP2xDP2, distributed, classic": ((2, 1), {"use_distributed_optimizer": True}, {"ckpt_format": "torch"}),
    "TP2xPP2, plain, in the background": ((2, 2), {}, {"async_save": True}),
    "TP2xPP2, plain, bf16, classic, in the background": (
        (2, 2),
        {"bf16": True},
        {"ckpt_format": "torch", "async_save": True},
    ),
    "DP4, distributed, bf16, classic": (
        (1, 1),
        {"use_distributed_optimizer": True, "bf16": True},
        {"ckpt_format": "torch"},
    ),
}
"""What is resumed: layout, settings of the run, settings of its saves. Dropout is on in all."""
BOTH_DROPOUTS = {"hidden_dropout": 0.1, "attention_dropout": 0.1}


@pytest.fixture(scope="module")
def straight(four_ranks, checkpoint, shards, tmp_path_factory):
    """(layout, settings) -> (losses, weights, hashes of the samples) of ten steps without a stop; made when first asked for."""
    done = {}

    def run(layout, **settings):
        key = (layout, *sorted(settings.items()))
        if key not in done:
            folder = tmp_path_factory.mktemp("straight")
            four_ranks.run(train, layout, checkpoint, shards, str(folder / "run"), 10, settings)
            hashes = read_metrics(folder / "run", "train/samples_hash")
            done[key] = read_metrics(folder / "run"), to_hf(str(folder / "run"), folder / "hf"), hashes
        return done[key]

    return run


SHOWN_BY_OTHERS = ("TP2xDP2, distributed", "TP2xPP2, plain, in the background")
"""Run always: the first with bf16 and with the classic format, the second in the classic format, and by test_resume_check in the other."""


@pytest.mark.parametrize(
    "case", [pytest.param(case, marks=[pytest.mark.thorough] * (case in SHOWN_BY_OTHERS)) for case in CASES]
)
@pytest.mark.works("resume", "dropout", "packing", "TP", "SP", ["PP", "DP"], ["background save", "classic checkpoints"])
@pytest.mark.works("resume", "DP", "distributed optimizer", "bf16", ["background save", "classic checkpoints"])
def test_same_layout_to_the_bit(case, straight, four_ranks, checkpoint, shards, tmp_path):
    """Losses, weights and samples of ten steps equal those of five, a save every second step, a new start and five more."""
    layout, settings, saves = CASES[case]
    losses, weights, hashes = straight(layout, **settings, **BOTH_DROPOUTS)
    run = tmp_path / "run"
    settings = settings | saves | BOTH_DROPOUTS
    four_ranks.run(train, layout, checkpoint, shards, str(run), 5, settings | {"save_interval": 2})
    four_ranks.run(train, layout, str(run), shards, str(run), 10, settings)
    assert read_metrics(run) == losses
    assert read_metrics(run, "train/samples_hash") == hashes and len(set(hashes)) == 10
    resumed = to_hf(str(run), tmp_path / "hf")
    assert resumed.keys() == weights.keys()
    assert all(torch.equal(resumed[name], weights[name]) for name in weights)


@pytest.fixture(scope="module")
def five_steps(four_ranks, checkpoint, shards, tmp_path_factory):
    """Precision, optimizer -> a run of five steps on TP2 x PP2; under the distributed optimizer saved in the background."""
    done = {}

    def run(**settings):
        key = tuple(sorted(settings.items()))
        if key not in done:
            done[key] = tmp_path_factory.mktemp("five") / "run"
            saves = {"async_save": "use_distributed_optimizer" in settings}
            four_ranks.run(train, (2, 2), checkpoint, shards, str(done[key]), 5, settings | saves)
        return done[key]

    return run


OTHER_LAYOUTS = {"PP4": (1, 4), "TP4": (4, 1), "DP4": (1, 1)}
OPTIMIZERS = {
    "plain": {},
    "distributed": {"use_distributed_optimizer": True},
    "distributed, bf16": {"use_distributed_optimizer": True, "bf16": True},
}
ALWAYS = {("PP4", "distributed"), ("TP4", "plain"), ("DP4", "plain"), ("DP4", "distributed")}
"""Each layout and each optimizer; the others are thorough."""
CHANGES = [
    pytest.param(
        OTHER_LAYOUTS[layout], OPTIMIZERS[optimizer], id=f"{layout}-{optimizer}",
        marks=[pytest.mark.thorough] * ((layout, optimizer) not in ALWAYS),
    )
    for layout in OTHER_LAYOUTS for optimizer in OPTIMIZERS
]  # fmt: skip


@pytest.mark.parametrize(("layout", "settings"), CHANGES)
@pytest.mark.works("resume in another layout", "dropout", "packing", ["TP", "PP", "DP"], "distributed optimizer")
@pytest.mark.works("resume in another layout", "bf16", "background save")
def test_other_layout_continues(layout, settings, straight, five_steps, four_ranks, shards, tmp_path):
    """From TP2 x PP2 to every other layout, dropout on: the same samples in the same order, and the losses of the run that never
    stopped.
    """
    settings = settings | {"hidden_dropout": 0.1}
    losses, _, hashes = straight((2, 2), **settings)
    shutil.copytree(five_steps(**settings), tmp_path / "run")
    four_ranks.run(train, layout, str(tmp_path / "run"), shards, str(tmp_path / "run"), 10, settings)
    assert read_metrics(tmp_path / "run", "train/samples_hash") == hashes
    apart = np.abs(np.array(read_metrics(tmp_path / "run")) - losses).max()
    assert apart < (1e-5 if "bf16" not in settings else 1e-3), apart


@pytest.mark.refuses("classic checkpoints", "resume in another layout", says="is in the classic format for TP")
def test_classic_into_another_layout_is_refused(four_ranks, checkpoint, shards, tmp_path):
    classic = {"ckpt_format": "torch", "use_distributed_optimizer": True}
    four_ranks.run(train, (2, 2), checkpoint, shards, str(tmp_path / "run"), 2, classic)
    said = four_ranks.run(attempt, str(tmp_path / "run"), shards, str(tmp_path / "run"), 4, classic, (2, 1))
    refusals = [one["error"] for one in said]
    assert all("is in the classic format for TP2 x PP2, this run is TP2 x PP1" in text for text in refusals), refusals
    said = four_ranks.run(
        attempt, str(tmp_path / "run"), shards, str(tmp_path / "run"), 4, {"ckpt_format": "torch"}, (2, 2)
    )
    assert all("was saved with --use_distributed_optimizer" in one["error"] for one in said), said


def test_other_data_is_noticed(one_rank, checkpoint, shards, tmp_path):
    """The rows consumed are hashed again when a run resumes: another order of the same shards does not pass for the same."""
    one_rank.run(train, (1, 1), checkpoint, shards, str(tmp_path / "run"), 3, {})
    said = one_rank.run(attempt, str(tmp_path / "run"), shards, str(tmp_path / "run"), 4, {})[0]
    assert "are this run's own, in the same order" in said["log"]
    said = one_rank.run(attempt, str(tmp_path / "run"), shards, str(tmp_path / "run"), 5, {"seed": 7})[0]
    assert "are not those that this run's shards and settings give" in said["log"]


def test_finetune_flag_starts_anew(one_rank, checkpoint, shards, tmp_path):
    """--finetune takes the weights of a training checkpoint and begins at iteration 0."""
    one_rank.run(steps, (1, 1), checkpoint, shards, str(tmp_path / "run"), 3, 0.0)
    one_rank.run(steps, (1, 1), str(tmp_path / "run"), shards, str(tmp_path / "again"), 3, 0.0, False, True)
    assert len(read_metrics(tmp_path / "again")) == 3
    assert read_metrics(tmp_path / "again")[0] < read_metrics(tmp_path / "run")[0]


@pytest.mark.parametrize("ckpt_format", ["torch_dist", pytest.param("torch", marks=pytest.mark.thorough)])
@pytest.mark.parametrize("distributed_optimizer", [True, False], ids=["distributed-optimizer", "plain"])
def test_flags_of_the_resumed_run_hold(distributed_optimizer, ckpt_format, one_rank, checkpoint, shards, tmp_path):
    """Another --lr after a stop is the one that is used, the saved one is not."""
    run, settings = tmp_path / "run", {"use_distributed_optimizer": distributed_optimizer, "ckpt_format": ckpt_format}
    one_rank.run(train, (1, 1), checkpoint, shards, str(run), 5, settings)
    one_rank.run(train, (1, 1), str(run), shards, str(run), 6, settings | {"lr": 1e-5})
    rates = read_metrics(run, "train/lr")
    assert rates[5] < 1e-5 < rates[4]


def test_saved_on_another_kind_of_device(one_rank, checkpoint, shards, tmp_path):
    """A GPU has a random stream that a CPU has not: it starts anew, everything else goes on."""
    run = tmp_path / "run"
    one_rank.run(steps, (1, 1), checkpoint, shards, str(run), 3, 0.0)
    one_rank.run(steps_with_a_stream_more, (1, 1), str(run), shards, str(run), 5, 0.0)
    one_rank.run(steps, (1, 1), str(run), shards, str(run), 6, 0.0)
    one_rank.run(steps, (1, 1), checkpoint, shards, str(tmp_path / "straight"), 6, 0.0)
    assert read_metrics(run) == read_metrics(tmp_path / "straight")


def steps_with_a_stream_more(*settings):
    """`steps` as on a GPU, as far as random streams are concerned."""
    state = device.rng_state
    device.rng_state = lambda: {**state(), "device": torch.zeros(16, dtype=torch.uint8)}
    try:
        steps(*settings)
    finally:
        device.rng_state = state


def steps(layout, load, shards, save, until, dropout, bf16=False, fresh=False):
    """Train until iteration `until` of a ten-step schedule, saving at the end."""
    finetune(
        layout, load=load, data_path=[shards], save=save, train_iters=until, lr_decay_iters=10, finetune=fresh,
        use_distributed_optimizer=True, hidden_dropout=dropout, attention_dropout=dropout, bf16=bf16,
    )  # fmt: skip


def train(layout, load, shards, save, until, settings):
    """Train until iteration `until` of a ten-step schedule, saving at the end."""
    finetune(layout, load=load, data_path=[shards], save=save, train_iters=until, lr_decay_iters=10, **settings)
