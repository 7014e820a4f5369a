"""The distributed optimizer's state through owners: what lies on the disk, what a rank holds and reads, and who reads whose files."""

import pytest
import torch

from megatron_ft.models.architecture import Architecture
from megatron_ft.models.pipeline import plain_split
from megatron_ft.planner import memory
from megatron_ft.shares import deal
from tests.checkpoints import owner_jobs as jobs

MIX = {
    "DP4": {},
    "DP4, bf16": {"bf16": True},
    "TP2xDP2, bf16, tied": {"tp": 2, "bf16": True, "tied": True},
    "TP2xDP2, fp16": {"tp": 2, "fp16": True},
    "PP2xDP2, bf16, tied": {"pp": 2, "bf16": True, "tied": True},
    "PP2xDP2, interleaved": {"pp": 2, "chunks": 2},
    "DP4, bf16, gradients in buckets": {"bf16": True, "buckets": True},
    "TP4, bf16": {"tp": 4, "bf16": True},
}
"""Layouts of four ranks, the optimizer distributed."""


@pytest.fixture
def ask(four_ranks, tmp_path):
    """Run a job on four ranks: (job, *arguments, settings) -> what each returned. The folder is the test's own."""
    return lambda job, *arguments: four_ranks.run(job, str(tmp_path), *arguments, timeout=120)


@pytest.mark.parametrize("mix", MIX)
def test_the_same_on_disk_as_the_engine_writes(mix, ask, tmp_path):
    """Keys, shapes, parts and bits of every tensor, and what is beside the tensors, equal the engine's own whole gather; a rank holds
    its share and at most one parameter more, where the engine's first rank holds everything.
    """
    found = ask(jobs.save_both_ways, MIX[mix])
    ours, engines = jobs.on_disk(tmp_path / "ours"), jobs.on_disk(tmp_path / "engine")
    assert len(ours.tensors) > 20 and any(".exp_avg_sq." in name for name in ours.tensors)
    assert ours == engines
    for rank in found:
        assert rank["held"] <= rank["share"] + rank["largest"], rank
    if MIX[mix].get("tp") != 4:  # one rank alone holds its state either way
        assert max(rank["held"] for rank in found) < max(rank["held_by_engine"] for rank in found) * 0.7


@pytest.mark.parametrize("mix", ["DP4", "TP2xDP2, bf16, tied", "PP2xDP2, interleaved", "TP2xDP2, fp16", "TP4, bf16"])
def test_either_reads_what_the_other_wrote(mix, ask):
    """Our checkpoint through the engine's plain load and the engine's through ours: weights and state of every rank, to the bit."""
    for rank in ask(jobs.read_each_other, MIX[mix]):
        assert rank["engine reads ours"] and rank["we read the engine's"]


def test_the_planner_knows_what_a_rank_holds(ask):
    """Four nodes of one process each: the fullest holds what the fullest rank's plan holds, and one parameter in fp32."""
    found = ask(jobs.save_both_ways, MIX["DP4, bf16"])
    arch = Architecture(**jobs.ARCH)
    job = memory.Job(plain_split(arch.num_layers, 1), 1, 4, 32, 1, 4, distributed_optimizer=True)
    largest = max(memory.parameter_sizes(arch, 1, arch.num_layers, True, True))
    assert memory.host_memory(arch, job, 1) == max(rank["held"] for rank in found) + 4 * largest


def test_a_rank_reads_its_own_parameters_only(ask):
    found = ask(jobs.count_what_is_read, MIX["DP4, bf16"])
    assert sum(rank["read"] for rank in found) == found[0]["whole"]
    for rank in found:
        assert 0 < rank["read"] <= rank["whole"] / 4 + rank["largest"], rank


OTHERS = [({"tp": 2}, {}), ({"tp": 2}, {"pp": 2, "chunks": 2}), ({}, {"tp": 4}), ({}, {"tp": 2})]
MORE = [
    ({"tp": 2}, {"tp": 4}),
    ({"tp": 2}, {"pp": 4}),
    ({}, {"pp": 2}),
    ({"pp": 2, "chunks": 2}, {"tp": 2}),
    ({"pp": 2}, {}),
]


@pytest.mark.parametrize(
    "first, other", OTHERS + [pytest.param(*pair, marks=pytest.mark.thorough) for pair in MORE], ids=str
)
def test_into_another_layout_and_on_to_disk(first, other, ask, tmp_path):
    """What is resumed elsewhere and saved again is what was saved: every tensor, put together from its parts."""
    common = {"bf16": True}
    ask(jobs.save_again, None, "first", first | common)
    ask(jobs.save_again, "first", "second", other | common)
    before, after = jobs.assembled(tmp_path / "first"), jobs.assembled(tmp_path / "second")
    assert before.keys() == after.keys()
    assert all(torch.equal(before[name], after[name]) for name in before)


def test_in_the_background(ask, tmp_path):
    """A forked writer has tensors of its own in host memory: what the optimizer does meanwhile does not reach the disk."""
    found = ask(jobs.save_while_training_goes_on, MIX["DP4, bf16"])
    assert all(rank["on the host"] and not rank["shared with the optimizer"] for rank in found)
    assert jobs.on_disk(tmp_path / "background").tensors == jobs.on_disk(tmp_path / "before").tensors


def test_a_part_that_nobody_writes_is_noticed(ask):
    """Also without the engine's exchange of what all ranks hold: by the plan of who writes what."""
    assert "invalid fill tensor-volume" in ask(jobs.save_with_a_gap)[0]


def test_a_tensor_missing_is_said_by_all(ask):
    """Also by ranks that own nothing of what is missing: none waits for one that has given up."""
    said = [rank["error"] for rank in ask(jobs.resume_without_a_tensor, MIX["DP4"])]
    assert len(set(said)) == 1 and "has no tensor optimizer.state.exp_avg" in said[0], said


@pytest.mark.parametrize("ranks", [1, 2, 3, 8, 64])
def test_dealing(ranks):
    """Everything once, no rank above an equal share and the largest, the same whenever asked."""
    sizes = [(7919 * i) % 1000 for i in range(100)] + [5000]
    owners = deal(sizes, ranks)
    loads = [sum(size for size, owner in zip(sizes, owners, strict=True) if owner == rank) for rank in range(ranks)]
    assert sum(loads) == sum(sizes) and max(loads) <= sum(sizes) / ranks + max(sizes)
    assert owners == deal(sizes, ranks) and set(owners) == set(range(ranks))


def test_pieces_cover_each_parameter():
    """Two buckets of 3 ranks: 6 numbers a rank, then 2."""
    from megatron_ft.checkpoints.owned_state import pieces

    assert pieces(0, 5, 0, 6) == [(0, 0, 5)]
    assert pieces(5, 18, 0, 6) == [(0, 0, 1), (1, 1, 7), (2, 7, 13)]
    assert pieces(6, 12, 0, 6) == [(1, 0, 6)]
    assert pieces(19, 22, 18, 2) == [(0, 0, 1), (1, 1, 3)]
