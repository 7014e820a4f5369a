"""Residual dropout drops the same entries in every layout, and what it drops is random."""

import numpy as np
import pytest

from tests.parallel.jobs import finetune, read_metrics


@pytest.fixture(scope="module")
def same_dropout(one_rank, checkpoint, shards, tmp_path_factory):
    """Losses and gradient norms of one process with LIMA dropout, and with dropout on the embedding too, two rows at once."""
    found = {}
    for lima in (True, False):
        folder = tmp_path_factory.mktemp("one")
        one_rank.run(train, (1, 1), checkpoint, shards, str(folder), {"lima_dropout": lima})
        found[lima] = [read_metrics(folder, name) for name in ("train/loss", "train/grad_norm")]
    return found


LAYOUTS = {
    "TP4": ((4, 1), {"sequence_parallel": False}),
    "TP4 + sequence parallel, one row at once": ((4, 1), {"micro_batch_size": 1}),
    "PP4": ((1, 4), {}),
    "DP4": ((1, 1), {}),
    "TP2xPP2, embedding too": ((2, 2), {"lima_dropout": False}),
    "PP2, interleaved": ((1, 2), {"num_layers_per_virtual_pipeline_stage": 1, "overlap_p2p_communication": True}),
    "PP2, uneven": ((1, 2), {"decoder_first_pipeline_num_layers": 1}),
    "layers recomputed": ((2, 2), {"recompute_granularity": "full"}),
}


@pytest.mark.parametrize("name", LAYOUTS)
@pytest.mark.works("dropout", "packing", ["SP", "PP", "VPP", "uneven stages", "DP"])
@pytest.mark.works("dropout", "recompute", "SP", "PP")
def test_masks_do_not_depend_on_the_layout(name, same_dropout, four_ranks, checkpoint, shards, tmp_path):
    """A quarter is dropped, and still every layout computes what one process computes."""
    layout, settings = LAYOUTS[name]
    four_ranks.run(train, layout, checkpoint, shards, str(tmp_path), settings)
    expected = same_dropout[settings.get("lima_dropout", True)]
    for metric, one in zip(("train/loss", "train/grad_norm"), expected):
        np.testing.assert_allclose(read_metrics(tmp_path, metric), one, rtol=1e-5 if metric == "train/loss" else 1e-4)


def test_dropout_makes_a_difference(same_dropout, one_rank, checkpoint, shards, tmp_path):
    """Else the test above would pass without any dropout."""
    one_rank.run(
        train, (1, 1), checkpoint, shards, str(tmp_path / "none"), {"hidden_dropout": 0.0, "lima_dropout": False}
    )
    one_rank.run(train, (1, 1), checkpoint, shards, str(tmp_path / "seed"), {"seed": 5})
    none, other, lima = (*(read_metrics(tmp_path / name) for name in ("none", "seed")), same_dropout[True][0])
    assert abs(none[0] - lima[0]) > 1e-3 and abs(other[0] - lima[0]) > 1e-3


def test_masks_are_random_enough(one_rank):
    """The rate at every p, and independence of neighbours in channel, position, row, layer and residual add."""
    rates, correlations = one_rank.run(statistics)[0]
    for p, rate in rates.items():
        assert rate == pytest.approx(p, abs=2e-3)
    assert correlations and all(abs(value) < 5e-3 for value in correlations.values()), correlations


def statistics():
    import torch

    from megatron_ft.models.dropout import keep_mask, token_keys

    keys = torch.from_numpy(token_keys(3, np.arange(8), 256)).transpose(1, 2)
    rates = {p: 1 - keep_mask(keys, 512, 4, p).float().mean().item() for p in (0.01, 0.1, 0.25, 0.5, 0.9)}
    here = keep_mask(keys, 512, 4, 0.5).float() - 0.5
    others = {
        "channel": here.roll(1, 2), "channel far": here.roll(256, 2), "position": here.roll(1, 0), "row": here.roll(1, 1),
        "add": keep_mask(keys, 512, 5, 0.5).float() - 0.5, "layer": keep_mask(keys, 512, 6, 0.5).float() - 0.5,
    }  # fmt: skip
    return rates, {name: 4 * (here * other).mean().item() for name, other in others.items()}


def train(layout, load, shards, folder, settings):
    finetune(
        layout, load=load, data_path=[shards], run_dir=folder, report=False, train_iters=4,
        **{"hidden_dropout": 0.25, "lima_dropout": True} | settings,
    )  # fmt: skip
