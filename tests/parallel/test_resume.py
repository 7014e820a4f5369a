"""Ten steps are five, a checkpoint and five: to the bit on the same layout, in data and to 1e-5 in loss on another."""

import numpy as np
import pytest
import torch

from megatron_ft import device
from tests.parallel.jobs import finetune, read_metrics, to_hf


@pytest.fixture(scope="module")
def straight(four_ranks, checkpoint, shards, tmp_path_factory):
    """Ten steps on TP2 x DP2 and TP2 x PP2 without a stop, dropout on; (losses, weights) by layout."""
    done = {}
    for layout in ((2, 1), (2, 2)):
        folder = tmp_path_factory.mktemp("straight")
        four_ranks.run(steps, layout, checkpoint, shards, str(folder / "run"), 10, 0.1)
        done[layout] = read_metrics(folder / "run"), to_hf(str(folder / "run"), folder / "hf")
    return done


@pytest.mark.parametrize("layout", [(2, 1), (2, 2)], ids=["TP2xDP2", "TP2xPP2"])
def test_same_layout_to_the_bit(layout, straight, four_ranks, checkpoint, shards, tmp_path):
    losses, weights = straight[layout]
    run = tmp_path / "run"
    four_ranks.run(steps, layout, checkpoint, shards, str(run), 5, 0.1)
    four_ranks.run(steps, layout, str(run), shards, str(run), 10, 0.1)
    assert read_metrics(run) == losses
    resumed = to_hf(str(run), tmp_path / "hf")
    assert resumed.keys() == weights.keys()
    assert all(torch.equal(resumed[name], weights[name]) for name in weights)


@pytest.mark.parametrize("layout", [(1, 4), (4, 1), (1, 1), (2, 1)], ids=["PP4", "TP4", "DP4", "TP2xDP2"])
def test_other_layout_continues(layout, four_ranks, checkpoint, shards, tmp_path):
    """From TP2 x PP2 to every other layout: the same rows and losses as the run that never stopped."""
    four_ranks.run(steps, (2, 2), checkpoint, shards, str(tmp_path / "straight"), 10, 0.0)
    four_ranks.run(steps, (2, 2), checkpoint, shards, str(tmp_path / "run"), 5, 0.0)
    four_ranks.run(steps, layout, str(tmp_path / "run"), shards, str(tmp_path / "run"), 10, 0.0)
    np.testing.assert_allclose(read_metrics(tmp_path / "run"), read_metrics(tmp_path / "straight"), rtol=1e-5)
    for name in ("train/tokens", "train/supervised_tokens", "train/consumed_samples"):
        assert read_metrics(tmp_path / "run", name) == read_metrics(tmp_path / "straight", name)


def test_bf16_resumes_to_the_bit(four_ranks, checkpoint, shards, tmp_path):
    four_ranks.run(steps, (2, 1), checkpoint, shards, str(tmp_path / "straight"), 10, 0.1, True)
    four_ranks.run(steps, (2, 1), checkpoint, shards, str(tmp_path / "run"), 5, 0.1, True)
    four_ranks.run(steps, (2, 1), str(tmp_path / "run"), shards, str(tmp_path / "run"), 10, 0.1, True)
    assert read_metrics(tmp_path / "run") == read_metrics(tmp_path / "straight")


def test_finetune_flag_starts_anew(one_rank, checkpoint, shards, tmp_path):
    """--finetune takes the weights of a training checkpoint and begins at iteration 0."""
    one_rank.run(steps, (1, 1), checkpoint, shards, str(tmp_path / "run"), 3, 0.0)
    one_rank.run(steps, (1, 1), str(tmp_path / "run"), shards, str(tmp_path / "again"), 3, 0.0, False, True)
    assert len(read_metrics(tmp_path / "again")) == 3
    assert read_metrics(tmp_path / "again")[0] < read_metrics(tmp_path / "run")[0]


def test_flags_of_the_resumed_run_hold(one_rank, checkpoint, shards, tmp_path):
    """Another --lr after a stop is the one that is used, the saved one is not."""
    run = tmp_path / "run"
    one_rank.run(steps, (1, 1), checkpoint, shards, str(run), 5, 0.0)
    one_rank.run(steps, (1, 1), str(run), shards, str(run), 6, 0.0, False, False, 1e-5)
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


def steps(layout, load, shards, save, until, dropout, bf16=False, fresh=False, lr=1e-3):
    """Train until iteration `until` of a ten-step schedule, saving at the end."""
    finetune(
        layout, load=load, data_path=[shards], save=save, train_iters=until, lr_decay_iters=10, finetune=fresh,
        use_distributed_optimizer=True, hidden_dropout=dropout, attention_dropout=dropout, bf16=bf16, lr=lr,
    )  # fmt: skip
