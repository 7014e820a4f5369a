"""What a user and the scheduler tell a job: cancel, requeue, make room, time is over. It saves, and the run ends as if undisturbed."""

import pytest

from tests.slurm.conftest import GRACE, KILL_WAIT
from tests.slurm.jobs import AT, SAVES, ends_as_undisturbed, make_room


def test_undisturbed(straight, start):
    ends_as_undisturbed(start(), straight, restarts=0)


def test_cancelled(cluster, straight, start):
    """Saved, never requeued; the next job goes on where it was."""
    job = start()
    job.until_step(AT)
    cluster.run("scancel", job.number)
    assert job.wait() == ("CANCELLED", "75:0"), job.output
    assert job.saved() == job.reached() >= AT and job.restarts == 0
    assert "cancelled, not requeued" in job.output
    job.submit()
    ends_as_undisturbed(job, straight, restarts=0)


def test_cancelled_while_it_starts(cluster, start):
    job = start()
    job.until(lambda: cluster.processes(job.number))
    cluster.run("scancel", job.number)
    assert job.wait()[0] == "CANCELLED", job.output
    assert job.saved() == 0 and job.restarts == 0


@pytest.mark.parametrize(
    "order, flags",
    [
        ("scontrol requeue", ()),
        ("scancel --signal=TERM", ()),  # all processes of the step, ranks too
        ("scancel --signal=TERM", ("--wandb_logger",)),  # wandb's own process is told too, and may be gone before ours
        ("scancel --batch --signal=TERM", ()),  # the script alone
        ("scancel --batch --signal=USR1", ()),
    ],
)
def test_told_to_stop(order, flags, cluster, straight, start):
    job = start(*flags)
    job.until_step(AT)
    assert any((job.save / "wandb").glob("offline-run*")) == bool(flags)  # it is really on, or really off
    cluster.run(*order.split(), job.number)
    assert job.until_requeued() == 0, job.output
    assert job.said()[0][0] == "75", job.output
    ends_as_undisturbed(job, straight)


def test_makes_room(cluster, straight, start):
    """A job with priority: SIGTERM to the step and not to the script; saved within the grace."""
    job = start()
    job.until_step(AT)
    other = make_room(cluster)
    assert job.until_requeued() == 0, job.output
    assert job.said()[0] == ("75", "requeued"), job.output
    assert cluster.wait(other, 60)[0] == "COMPLETED"
    ends_as_undisturbed(job, straight)


def test_makes_room_too_slowly(cluster, straight, start):
    """SIGKILL after the grace: what was done since the last save is done again."""
    job = start()
    job.until_step(AT)
    with job.frozen_for_good():
        reached = job.reached()
        other = make_room(cluster)
        # SLURM looks whether the grace is over every few seconds.
        job.until_requeued(GRACE + KILL_WAIT + 60)
    assert job.saved() == reached // SAVES * SAVES
    assert cluster.wait(other, 60)[0] == "COMPLETED"
    ends_as_undisturbed(job, straight)


@pytest.mark.parametrize("name, says", [("USR1", "time is nearly over"), ("TERM", "told to stop")])
def test_time_is_nearly_over(name, says, cluster, straight, start):
    """Told at some moment of the job's first 40 seconds."""
    job = start("--exit_before_end_in_mins", 0, time=1, signal=f"B:{name}@20")
    job.until_step(AT, or_until=says)
    job.freeze()  # so that it is not done before
    job.until(lambda: says in job.output)
    job.thaw()
    assert job.until_requeued() == 0, job.output
    cluster.run("scontrol", "update", f"JobId={job.number}", "TimeLimit=60")
    ends_as_undisturbed(job, straight)


def test_looks_at_the_clock_itself(cluster, straight, start):
    """SLURM 22.05 does not tell a job its end; the script asks. 0.8 minutes before it the run saves and leaves."""
    job = start("--exit_before_end_in_mins", 0.8, time=1, signal="B:USR1@1")
    assert job.until_requeued() == 0, job.output
    assert job.said()[0] == ("75", "requeued") and "time is nearly over" not in job.output
    cluster.run("scontrol", "update", f"JobId={job.number}", "TimeLimit=60")
    ends_as_undisturbed(job, straight)
