"""Disturbs jobs of a real SLURM at random moments: is what becomes of each job right, and is any step lost that should not be?

    python benchmarks/slurm_events.py [--events 200] [--a_job 50] [--seed 0] [--seconds 1e9]       as root

The 70B example's batch script as it is, with a small model, TP2 x PP2 on two of four nodes, each with a host name, processes, a /tmp and a
network of its own. Every second job logs to wandb. What happens to them, in random order, 0 to 12 s after a start, which may be while it
loads:

    cancel    scancel; then submitted anew            room      preempted, within the grace
    requeue   scontrol requeue                        no_grace  preempted, and frozen until SIGKILL
    step      SIGTERM to every process of the step    time      the time limit: SIGUSR1 to the script 20 s before
    batch     SIGTERM or SIGUSR1 to the script alone  daemon    SIGKILL to a node's slurmd; its processes live on
    network   a node is cut off, the one with the script and rank 0 too, and comes back later

Right: requeued, or cancelled and not requeued; and where there was grace, or the processes could hear of it, no step that was done is
lost. Else the steps since the last save are, at most. In the end each job is COMPLETED with the losses and the samples of a job that
nobody disturbed, to the bit. Needs what slurm_cluster.py needs.
"""

from __future__ import annotations

import argparse
import random
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Callable
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from benchmarks.slurm_cluster import Cluster, ClusterError
from tests.errors.conftest import ROOT
from tests.slurm.jobs import SAVES, Job, make_room, make_shop

STEPS = 400
LATEST = STEPS - 80
"""No event after this step: the job might be done before it is felt."""
GRACE, KILL_WAIT = 15, 8
SHARES = {
    "cancel": 16, "requeue": 16, "step": 16, "batch": 16, "room": 12, "no_grace": 6, "time": 6, "daemon": 6, "network": 6,
}  # fmt: skip
"""Of a hundred events."""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    for name, default in {"events": 200, "a_job": 50, "seed": 0}.items():
        parser.add_argument(f"--{name}", type=int, default=default)
    parser.add_argument("--seconds", type=float, default=1e9, help="begin no new event after so many")
    given = parser.parse_args()
    shared = Path(tempfile.mkdtemp(prefix="slurm-"))
    share = (str(shared), str(ROOT), sys.prefix)
    shape = {"nodes": 4, "cpus": 64, "gpus": 8, "apart": True, "share": share, "grace": GRACE, "kill_wait": KILL_WAIT}
    with Cluster(shared / "c", **shape) as cluster:
        campaign = Campaign(cluster, shared, random.Random(given.seed), time.monotonic() + given.seconds)
        while campaign.goes_on(given.events):
            campaign.job(min(given.a_job, given.events - len(campaign.lost)))
    campaign.say()
    sys.exit(bool(campaign.wrong))


class Campaign:
    """Jobs of one cluster, one after the other. until: no new event then (s, monotonic)."""

    def __init__(self, cluster: Cluster, shared: Path, chance: random.Random, until: float):
        self.cluster, self.shared, self.chance, self.until = cluster, shared, chance, until
        self.shop = make_shop(shared / "shop")
        self.lost: list[tuple[str, int]] = []
        """(what happened, steps lost by it)."""
        self.wrong: list[str] = []
        self.jobs = 0
        self.began = time.monotonic()
        job = self._new()
        assert job.wait(1800) == ("COMPLETED", "0:0"), job.output
        self.undisturbed = job.numbers()
        print(f"undisturbed: {len(self.undisturbed[0])} steps in {time.monotonic() - self.began:.0f} s", flush=True)

    def goes_on(self, events: int) -> bool:
        return len(self.lost) < events and time.monotonic() < self.until

    def job(self, events: int) -> None:
        """Disturb one job so many times, or until it is nearly done, and let it end."""
        job = self._new(*(["--wandb_logger"] if self.jobs % 2 else []))
        self.jobs += 1
        for _ in range(events):
            kind = self.chance.choices(list(SHARES), list(SHARES.values()))[0]
            try:
                if not self._event(job, kind):
                    break
            except (AssertionError, ClusterError) as error:
                self.wrong.append(f"{kind}: {error}")
                print(f"WRONG: {kind}: {error}\n{job.output[-3000:]}", flush=True)
                self._mend_all()
            if time.monotonic() > self.until:
                break
        try:
            assert job.wait(1800) == ("COMPLETED", "0:0"), f"ended {job.cluster.show(job.number)}"
            assert job.numbers() == self.undisturbed, "other losses or samples than an undisturbed job"
        except (AssertionError, ClusterError) as error:
            self.wrong.append(f"the end: {error}")
            print(f"WRONG: the end: {error}\n{job.output[-3000:]}", flush=True)
        print(f"job {self.jobs}: {len(self.lost)} events so far, {len(self.wrong)} wrong", flush=True)

    def say(self) -> None:
        for kind in SHARES:
            found = [steps for what, steps in self.lost if what == kind]
            if found:
                counted = ", ".join(f"{steps}: {times} times" for steps, times in sorted(Counter(found).items()))
                print(f"{kind:9} {len(found):4} times; steps lost: {counted}")
        print(
            f"{len(self.lost)} events in {self.jobs} jobs, {len(self.wrong)} wrong, {(time.monotonic() - self.began) / 60:.0f} minutes"
        )

    def _new(self, *flags: str) -> Job:
        folder = Path(tempfile.mkdtemp(prefix="job", dir=self.shared))
        more = ("--train_iters", STEPS, "--exit_before_end_in_mins", 0)
        return Job(self.cluster, self.shop, folder, *more, *flags, env={"MAX_RESTARTS": "20"}, signal="B:USR1@20")

    def _event(self, job: Job, kind: str) -> bool:
        """False: the job is nearly done."""
        self.cluster.wait_for(job.number, lambda fields: fields["JobState"] == "RUNNING", 120, "is not started again")
        job.requeued = job.restarts
        before, until = len(job.measured()), time.monotonic() + self.chance.uniform(0, 12)
        job.until(lambda: self.cluster.processes(job.number) or self.cluster.state(job.number) != "RUNNING")
        while time.monotonic() < until:
            time.sleep(0.05)
        if job.reached() > LATEST:
            return False
        began, at = time.monotonic(), job.reached()
        lossless = getattr(self, f"_{kind}")(job)
        done = job.measured()[before:]
        lost = done[-1]["iteration"] - job.saved() if done else 0
        self.lost.append((kind, lost))
        print(f"{len(self.lost):4} {kind:9} at step {at}, {lost} lost, {time.monotonic() - began:.0f} s", flush=True)
        assert lost == 0 if lossless else lost <= SAVES, f"{lost} steps lost"
        return True

    # Events. Each returns whether no step may be lost.

    def _cancel(self, job: Job) -> bool:
        self.cluster.run("scancel", job.number)
        state, _ = job.wait()
        assert (state, job.restarts) == ("CANCELLED", job.requeued), f"{state}, restarts {job.restarts}"
        job.submit()
        return True

    def _told(self, job: Job, *order: str) -> bool:
        self.cluster.run(*order, job.number)
        job.until_requeued()
        return True

    def _requeue(self, job: Job) -> bool:
        return self._told(job, "scontrol", "requeue")

    def _step(self, job: Job) -> bool:
        return self._told(job, "scancel", "--signal=TERM")

    def _batch(self, job: Job) -> bool:
        return self._told(job, "scancel", "--batch", f"--signal={self.chance.choice(['TERM', 'USR1'])}")

    def _room(self, job: Job) -> bool:
        other = make_room(self.cluster)
        job.until_requeued()
        assert self.cluster.wait(other, 60)[0] == "COMPLETED"
        return True

    def _no_grace(self, job: Job) -> bool:
        with job.frozen_for_good():
            other = make_room(self.cluster)
            job.until_requeued(GRACE + KILL_WAIT + 60)
        assert self.cluster.wait(other, 60)[0] == "COMPLETED"
        return False

    def _time(self, job: Job) -> bool:
        ran = time.time() - time.mktime(time.strptime(self.cluster.show(job.number)["StartTime"], "%Y-%m-%dT%H:%M:%S"))
        self.cluster.run("scontrol", "update", f"JobId={job.number}", f"TimeLimit={int(ran + 25) // 60 + 1}")
        job.until_requeued(120)
        self.cluster.run("scontrol", "update", f"JobId={job.number}", "TimeLimit=UNLIMITED")
        return True

    def _daemon(self, job: Job) -> bool:
        """SLURM tells the script of the other node, or nobody; a node whose daemon is dead cannot be told, but its launcher hears of it."""
        return self._without_a_node(job, self.cluster.kill, self.cluster.start)

    def _network(self, job: Job) -> bool:
        return self._without_a_node(job, self.cluster.cut, self.cluster.mend)

    def _without_a_node(self, job: Job, take: Callable[[str], None], give_back: Callable[[str], None]) -> bool:
        node = self.chance.choice(job.nodes)
        take(node)
        job.until_requeued(120)
        time.sleep(self.chance.uniform(0, 20))
        give_back(node)
        # Its old processes take a minute or two to leave; the next event is not to meet them.
        job.until(lambda: job.is_left_alone() or job.reached() > LATEST, 300)
        return False

    def _mend_all(self) -> None:
        for node in self.cluster.nodes:
            self.cluster.mend(node)
            self.cluster.start(node)


if __name__ == "__main__":
    main()
