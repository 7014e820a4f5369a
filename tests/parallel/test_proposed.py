"""Layouts that `plan` proposes for a model whose layers do not divide evenly train, and compute what one process computes."""

import dataclasses
import shlex

import numpy as np
import pytest

from tests.parallel.jobs import SEQ_LENGTH, make_llama, read_metrics, to_checkpoint

LAYERS = 14


@pytest.fixture(scope="module")
def deep(tmp_path_factory):
    folder = tmp_path_factory.mktemp("deep")
    hf = make_llama(folder / "hf", num_hidden_layers=LAYERS)
    return to_checkpoint(hf, folder / "checkpoint", "torch_dist", 1, 1)


def run(flags, load, shards, save):
    """`megatron-ft finetune` with flags as plan prints them."""
    from megatron_ft.commands import finetune
    from megatron_ft.config.cli import parse

    words = f"--load {load} --data_path {shards} --save {save} --train_iters 2 --lr 1e-3 --log_interval 1000 --no_report {flags}"
    return finetune.run(*parse(finetune.COMMAND, shlex.split(words)))


def job_of(tp, pp, chunks, **more):
    from megatron_ft.planner.memory import Job
    from megatron_ft.planner.splits import nearly_even

    split, dp = nearly_even(LAYERS, pp, chunks), 4 // (tp * pp)
    return Job(
        split, tp, dp, SEQ_LENGTH, 1, 8, bf16=False, sequence_parallel=tp > 1, distributed_optimizer=dp > 1, **more
    )  # fmt: skip


@pytest.fixture(scope="module")
def expected(deep, shards, one_rank, tmp_path_factory):
    from megatron_ft.planner import search

    save = tmp_path_factory.mktemp("one") / "run"
    one = dataclasses.replace(job_of(1, 1, 1), dp=1, distributed_optimizer=False)
    assert one_rank.run(run, search.flags(one), deep, shards, str(save)) == [0]
    return read_metrics(save)


PROPOSED = {
    "PP4": job_of(1, 4, 1),
    "PP2, interleaved, two layers of a chunk recomputed": job_of(
        1, 2, 4, recompute="full", recompute_method="block", recompute_layers=1
    ),
    "TP2 x PP2, MLPs and norms recomputed": job_of(2, 2, 3, recompute="selective", recompute_modules=("mlp", "layernorm")),
}  # fmt: skip


@pytest.mark.parametrize("name", PROPOSED)
@pytest.mark.works("uneven stages", "VPP", "recompute", ["SP", "distributed optimizer"])
def test_a_proposal_trains_as_one_process(name, expected, deep, shards, four_ranks, tmp_path):
    from megatron_ft.planner import search

    flags = search.flags(PROPOSED[name])
    assert "_pipeline_num_layers" in flags or "--pipeline_model_parallel_layout" in flags
    assert four_ranks.run(run, flags, deep, shards, str(tmp_path / "run")) == [0] * 4
    np.testing.assert_allclose(read_metrics(tmp_path / "run"), expected, rtol=1e-5)
