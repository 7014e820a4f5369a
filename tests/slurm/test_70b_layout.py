"""The layout that the 70B script is made for: 4 nodes x 8 processes, TP8 x PP4."""

import pytest

from tests.slurm.jobs import Job, ends_as_undisturbed, make_shop

LAYOUT = ("--tensor_model_parallel_size", 8, "--pipeline_model_parallel_size", 4, "--train_iters", 8)
AT = 3


@pytest.fixture(scope="module")
def wide(shared):
    """16 heads and 8 keys and values: as many as there are ranks in a tensor-parallel group."""
    return make_shop(shared / "wide", hidden_size=256)


def on_32(start, wide) -> Job:
    return start(*LAYOUT, nodes=4, env={"GPUS_PER_NODE": "8"}, shop=wide)


def test_requeued(start, wide, cluster, straight):
    """The losses of an undisturbed run of this layout, to the bit, and the samples of a run of any."""
    undisturbed = on_32(start, wide)
    assert undisturbed.wait(400) == ("COMPLETED", "0:0"), undisturbed.output
    steps, _, samples = numbers = undisturbed.numbers()
    assert steps == list(range(1, 9)) and samples == straight[2][: len(steps)]

    job = on_32(start, wide)
    job.until_step(AT, seconds=300)
    cluster.run("scontrol", "requeue", job.number)
    assert job.until_requeued() == 0, job.output
    ends_as_undisturbed(job, numbers, seconds=400)
