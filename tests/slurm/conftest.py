"""A real SLURM of four nodes, one for all tests here; a small model and shards; jobs that run the 70B script on them."""

from __future__ import annotations

import shutil
import sys
import tempfile
from pathlib import Path

import pytest

from benchmarks.slurm_cluster import Cluster, missing
from tests.errors.conftest import ROOT
from tests.slurm.jobs import STEPS, Job, Shop, make_shop

GRACE = 15
"""Seconds of the partition `low`."""
KILL_WAIT = 30
SHORT = ("test_cancelled",)
"""In `make test` too: a job is cancelled, saves, and the next goes on; the rest is for `make test-slurm`."""


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """All here need a SLURM. Skipped, with the reason, where there is none."""
    here = [item for item in items if Path(__file__).parent in item.path.parents]
    why = missing(apart=True) if here else None
    for item in here:
        if item.name not in SHORT:
            item.add_marker(pytest.mark.slurm)
        if why:
            item.add_marker(pytest.mark.skip(reason=why))


@pytest.fixture(scope="session")
def shared():
    """A folder that the nodes see; its path is short, since sockets lie in it."""
    folder = Path(tempfile.mkdtemp(prefix="slurm-"))
    yield folder
    shutil.rmtree(folder, ignore_errors=True)


@pytest.fixture(scope="session")
def cluster(shared):
    """Four nodes of 8 GPUs that are files, each with a host name, a /tmp and a network of its own."""
    folder = Path(tempfile.mkdtemp(prefix="c", dir=shared))
    share = (str(shared), str(ROOT), sys.prefix)
    with Cluster(folder, nodes=4, cpus=64, gpus=8, apart=True, share=share, grace=GRACE, kill_wait=KILL_WAIT) as made:
        yield made


@pytest.fixture(scope="session")
def shop(shared) -> Shop:
    return make_shop(shared / "shop")


@pytest.fixture
def start(cluster, shop, shared):
    """Start a job: start(*flags, **Job's options). Cancelled at the end, and the nodes are idle again."""
    jobs = []

    def begin(*flags, shop: Shop = shop, **options) -> Job:
        folder = Path(tempfile.mkdtemp(prefix="job", dir=shared))
        jobs.append(Job(cluster, shop, folder, *flags, **options))
        return jobs[-1]

    yield begin
    for job in jobs:
        job.thaw()
        cluster.run("scancel", job.number)
    for node in cluster.nodes:
        cluster.mend(node)
        cluster.start(node)
    cluster.ready(90)


@pytest.fixture(scope="session")
def straight(cluster, shop, shared):
    """The numbers of a run that nobody disturbs; made when first asked for."""
    job = Job(cluster, shop, Path(tempfile.mkdtemp(prefix="job", dir=shared)))
    assert job.wait(180) == ("COMPLETED", "0:0"), job.output
    assert len(job.metrics()) == STEPS and job.saved() == STEPS
    return job.numbers()
