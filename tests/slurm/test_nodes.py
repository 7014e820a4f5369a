"""What fails by itself: a node's network, SLURM's daemon on it, a process. What was saved stays, and the run ends as if undisturbed."""

import pytest

from tests.slurm.jobs import AT, SAVES, ends_as_undisturbed

WHERE = pytest.mark.parametrize("where", [0, 1], ids=["first node", "second node"])
"""On the first are the script, srun and rank 0."""


@WHERE
def test_network_cut(where, cluster, straight, start):
    """Started again on other nodes by whoever hears of it. The script of a first node that comes back leaves that alone; its srun, where it
    is giving up at that moment, ends the step of the same number, which is the new one: the job is then requeued once more.
    """
    job = start()
    job.until_step(AT)
    node, saved = job.nodes[where], job.saved()
    cluster.cut(node)
    job.until_requeued()
    assert job.saved() >= saved
    job.until(lambda: cluster.processes(job.number))
    assert node not in job.nodes
    cluster.mend(node)
    ends_as_undisturbed(job, straight, more=where == 0)


@WHERE
def test_daemon_killed(where, cluster, straight, start):
    """SLURM takes the node for down, the processes on it live on: they are told by those on the other, and nothing is lost."""
    job = start()
    job.until_step(AT)
    node = job.nodes[where]
    job.freeze()  # a long step: they are not done before SLURM has noticed
    cluster.kill(node)
    cluster.wait_for(job.number, lambda fields: fields["JobState"] != "RUNNING", 90, "is not requeued")
    job.thaw()
    job.until_requeued()
    cluster.start(node)
    ends_as_undisturbed(job, straight)


def test_rank_killed(cluster, straight, start):
    """On the second node: not taken for a stop that saved."""
    job = start()
    job.until_step(AT)
    node = job.nodes[1]
    job.kill_rank(3)
    job.until_requeued()
    assert job.said() == [("1", "requeued")], job.output
    assert f"on {node}) was ended by SIGKILL" in job.first_error(), job.output
    assert job.saved() == AT // SAVES * SAVES
    ends_as_undisturbed(job, straight)
