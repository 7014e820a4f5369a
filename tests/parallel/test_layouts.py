"""Every layout computes the same training run: losses and gradient norms over 20 steps against one process."""

import numpy as np
import pytest

from tests.parallel.jobs import finetune, read_metrics

LAYOUTS = {"TP4": (4, 1), "PP4": (1, 4), "TP2xPP2": (2, 2), "TP2xDP2": (2, 1), "DP4": (1, 1)}
"""TP x PP on four processes; what is left is data parallel."""
OPTIMIZERS = {"plain": False, "distributed-optimizer": True}
THOROUGH = {
    *(("TP4", name) for name in OPTIMIZERS), ("PP4", "distributed-optimizer"), ("TP2xPP2", "plain"), ("DP4", "plain")
}  # fmt: skip
"""The others show each layout, and the distributed optimizer over 1, 2 and 4 replicas."""
CASES = [
    pytest.param(layout, distributed, id=f"{name}-{kind}", marks=[pytest.mark.thorough] * ((name, kind) in THOROUGH))
    for name, layout in LAYOUTS.items()
    for kind, distributed in OPTIMIZERS.items()
]


@pytest.fixture(
    scope="module", params=[True, pytest.param(False, marks=pytest.mark.thorough)], ids=["packed", "unpacked"]
)
def reference(request, one_rank, checkpoint, shards, tmp_path_factory):
    """(packing, folder with the metrics of one process)."""
    folder = tmp_path_factory.mktemp("one")
    one_rank.run(run_on, (1, 1), checkpoint, shards, request.param, False, str(folder))
    return request.param, folder


@pytest.mark.parametrize(("layout", "distributed_optimizer"), CASES)
@pytest.mark.works(["TP", "PP", "DP"], ["packing", "padded rows"], "distributed optimizer")
@pytest.mark.works("TP", "SP", ["PP", "DP"], "packing")
def test_layout_trains_as_one_process(
    layout, distributed_optimizer, reference, four_ranks, checkpoint, shards, tmp_path
):
    packing, one = reference
    four_ranks.run(run_on, layout, checkpoint, shards, packing, distributed_optimizer, str(tmp_path))
    for name, tolerance in (("train/loss", 1e-4), ("train/grad_norm", 1e-3)):
        np.testing.assert_allclose(read_metrics(tmp_path, name), read_metrics(one, name), rtol=tolerance)
    for name in ("train/tokens", "train/supervised_tokens", "train/lr"):
        assert read_metrics(tmp_path, name) == read_metrics(one, name)


def test_the_reference_is_worth_comparing_with(reference):
    """It learns, over 20 steps, and its masks are uneven: the supervised share differs from step to step."""
    _, one = reference
    losses, tokens = read_metrics(one), read_metrics(one, "train/tokens")
    supervised = read_metrics(one, "train/supervised_tokens")
    assert len(losses) == 20 and losses[-1] < losses[0]
    assert len({round(s / t, 3) for s, t in zip(supervised, tokens)}) > 10
    assert all(0 < s < t <= 8 * 64 for s, t in zip(supervised, tokens))


@pytest.mark.parametrize("layout", [(1, 4), (2, 2)], ids=["PP4", "TP2xPP2"])
@pytest.mark.works("rows of variable length", "TP", "SP", "PP")
def test_rows_of_variable_length_change_nothing(layout, four_ranks, checkpoint, shards, tmp_path):
    """Rows as long as their longest sample, against rows of seq_length: the padding was never more than padding. Stages know the
    lengths, and exchange nothing about them.
    """
    for variable in (False, True):
        four_ranks.run(variable_rows, layout, checkpoint, shards, variable, str(tmp_path / str(variable)))
    for name in ("train/loss", "train/grad_norm"):
        ours, padded = (read_metrics(tmp_path / str(variable), name) for variable in (True, False))
        np.testing.assert_allclose(ours, padded, rtol=1e-4)


def variable_rows(layout, checkpoint, shards, variable, folder):
    from megatron.core.pipeline_parallel.p2p_communication import P2PCommunicator

    def refuse(*_):
        raise AssertionError("a stage told another the shape of a tensor")

    P2PCommunicator._communicate_shapes = refuse
    finetune(
        layout, load=checkpoint, data_path=[shards], packing=False, variable_seq_lengths=variable, train_iters=6,
        micro_batch_size=1, run_dir=folder,
    )  # fmt: skip


def run_on(layout, checkpoint, shards, packing, distributed_optimizer, folder):
    finetune(
        layout, load=checkpoint, data_path=[shards], packing=packing, run_dir=folder,
        use_distributed_optimizer=distributed_optimizer,
    )  # fmt: skip
