"""Interleaved and uneven pipelines: checkpoints that they save continue anywhere, and anything continues in them."""

import numpy as np
import pytest
import torch

from tests.parallel.jobs import finetune, read_metrics, to_checkpoint, to_hf
from tests.ranks import RankFailed, Ranks

SPLITS = {
    "interleaved": ((1, 2), {"virtual_pipeline_model_parallel_size": 2}),
    "uneven": ((2, 2), {"decoder_last_pipeline_num_layers": 1}),
    "written out": ((1, 2), {"pipeline_model_parallel_layout": "E|tt|t|tL"}),
}


@pytest.fixture(scope="module")
def straight(one_rank, checkpoint, shards, tmp_path_factory):
    """Six steps on one process: (losses, weights)."""
    folder = tmp_path_factory.mktemp("straight")
    one_rank.run(steps, (1, 1), checkpoint, shards, str(folder / "run"), 6, {})
    return read_metrics(folder / "run"), to_hf(str(folder / "run"), folder / "hf")


@pytest.mark.parametrize(("name", "distributed_optimizer"), [*((name, True) for name in SPLITS), ("uneven", False)])
@pytest.mark.works("resume in another layout", "distributed optimizer", "DP", "VPP")
@pytest.mark.works("resume in another layout", "distributed optimizer", "SP", "uneven stages")
def test_split_and_back(name, distributed_optimizer, straight, one_rank, four_ranks, checkpoint, shards, tmp_path):
    """Two steps in the split, two more after a stop, two on TP2 x PP2 or one process: one run of six steps."""
    layout, flags = SPLITS[name]
    flags = flags | {"use_distributed_optimizer": distributed_optimizer}
    run = str(tmp_path / "run")
    four_ranks.run(steps, layout, checkpoint, shards, run, 2, flags)
    four_ranks.run(steps, layout, run, shards, run, 4, flags)
    four_ranks.run(steps, (2, 2), run, shards, run, 6, {"use_distributed_optimizer": distributed_optimizer})
    losses, weights = straight
    np.testing.assert_allclose(read_metrics(tmp_path / "run"), losses, rtol=1e-5)
    ours = to_hf(run, tmp_path / "hf")
    for key, value in weights.items():
        torch.testing.assert_close(ours[key], value, rtol=1e-3, atol=1e-4)


@pytest.mark.works("resume", "VPP", "DP", "dropout", "distributed optimizer")
def test_a_stop_in_an_interleaved_run_changes_no_bit(four_ranks, checkpoint, shards, tmp_path):
    layout, flags = (
        (1, 2),
        {"virtual_pipeline_model_parallel_size": 2, "hidden_dropout": 0.1, "use_distributed_optimizer": True},
    )
    four_ranks.run(steps, layout, checkpoint, shards, str(tmp_path / "straight"), 4, flags)
    four_ranks.run(steps, layout, checkpoint, shards, str(tmp_path / "run"), 2, flags)
    four_ranks.run(steps, layout, str(tmp_path / "run"), shards, str(tmp_path / "run"), 4, flags)
    assert read_metrics(tmp_path / "run") == read_metrics(tmp_path / "straight")


REFUSED = [
    (
        {"virtual_pipeline_model_parallel_size": 2, "global_batch_size": 6},
        "multiple of --pipeline",
    ),
    ({"virtual_pipeline_model_parallel_size": 3}, "is more than the model's num_layers 4"),
    ({"virtual_pipeline_model_parallel_size": 2, "packing": False, "variable_seq_lengths": True}, "rows of one length"),
    ({"virtual_pipeline_model_parallel_size": 2, "num_layers_per_virtual_pipeline_stage": 1}, "both define how layers"),
]


@pytest.mark.parametrize(("flags", "message"), REFUSED)
@pytest.mark.refuses(
    "VPP", "rows of variable length", says="--variable_seq_lengths does not go with interleaved stages"
)
def test_a_split_that_cannot_be_is_refused_before_process_groups(
    flags, message, checkpoint, shards, tmp_path, monkeypatch
):
    from megatron_ft.engine import parallel
    from megatron_ft.errors import ConfigError

    monkeypatch.setenv("WORLD_SIZE", "2")
    monkeypatch.setattr(parallel, "process_groups", None)  # to be reached is to fail
    with pytest.raises(ConfigError, match=message):
        finetune((1, 2), load=checkpoint, data_path=[shards], **flags)


@pytest.mark.refuses(
    "VPP",
    "classic checkpoints",
    says="make a torch_dist checkpoint with megatron-ft reshard, which loads into any layout",
)
def test_a_classic_checkpoint_does_not_load_into_chunks(llama, shards, tmp_path):
    root = to_checkpoint(llama, tmp_path / "classic", "torch", 1, 2)
    ranks = Ranks(2)
    with pytest.raises(RankFailed, match=r"stages hold layers 1, 3 \| 2, 4: make a torch_dist checkpoint"):
        ranks.run(steps, (1, 2), root, shards, str(tmp_path / "run"), 1, {"virtual_pipeline_model_parallel_size": 2})


def steps(layout, load, shards, save, until, flags):
    finetune(
        layout, load=load, data_path=[shards], save=save, report=False, train_iters=until, lr_decay_iters=10, **flags
    )  # fmt: skip
