"""How a job ends, as scontrol shows it; a rehearsal in the place of a run; shards made by an array, and merged."""

import shutil
import sys
import tempfile
from pathlib import Path

from benchmarks.slurm_cluster import ENDED

PARTS = 2


def test_a_mistake(start):
    job = start("--load", "nowhere")
    assert job.wait() == ("FAILED", "2:0"), job.output
    assert job.restarts == 0 and "nowhere" in job.first_error()
    assert "not requeued" in job.output


def test_given_up(start):
    """A rank is killed at every start, before anything is saved."""
    job = start("--save_interval", 1000, env={"MAX_RESTARTS": "1"})
    for restart in range(2):
        job.until(lambda n=restart: job.restarts == n and job.reached() and job.output.count("launchers meet") == n + 1)
        job.kill_rank(2)
        if restart == 0:
            job.until_requeued()
            (job.save / "metrics.jsonl").unlink()
    assert job.wait() == ("FAILED", "70:0"), job.output
    assert job.restarts == 1 and "given up, not requeued" in job.output
    assert job.saved() == 0


def test_rehearsal(start):
    """The script as it is, on its own nodes: what the first prepares the others find, and nothing is written."""
    job = start(env={"MEGATRON_FT_REHEARSE": "1"})
    assert job.wait() == ("COMPLETED", "0:0"), job.output
    assert job.output.count("rehearsal on this machine's CPU, 4 processes") == 1
    assert not job.save.exists() and [path.name for path in job.folder.iterdir()] in ([], ["logs"])


def test_rehearsal_where_nothing_is_shared(start):
    """Each node has a /tmp of its own. Refused once they have waited for one another as long as a shared folder may be slow."""
    name = Path("/tmp/megatron_ft-not-shared")
    job = start(env={"MEGATRON_FT_REHEARSE": "1", "SAVE": f"{name}/save"})
    assert job.wait(150) == ("FAILED", "2:0"), job.output
    assert "--save" in job.first_error() and "share" in job.first_error(), job.output
    assert not name.exists()


def test_array_and_merge(cluster, shop, shared):
    """A task that had finished and is requeued ends with 0, and the merge that waits for the array begins."""
    folder = Path(tempfile.mkdtemp(prefix="array", dir=shared))
    lines = shop.chats.read_text().splitlines(keepends=True)
    for part in range(PARTS):
        (folder / f"part-{part}.jsonl").write_text("".join(lines[part::PARTS]))
    array, merge = folder / "array.sh", folder / "merge.sh"
    array.write_text(
        f"#!/bin/bash\nset -e\n{sys.executable} -m megatron_ft pretokenize --input part-$SLURM_ARRAY_TASK_ID.jsonl "
        f"--tokenizer {shop.tokenizer} --output_prefix $PWD/$SLURM_ARRAY_TASK_ID\n"
        # The first time it stays, so that it is requeued with its shards whole.
        "touch written-$SLURM_ARRAY_TASK_ID\nwhile [ ${SLURM_RESTART_COUNT:-0} = 0 ]; do sleep 0.2; done\n"
    )
    prefixes = " ".join(f"{part}-train" for part in range(PARTS))
    merge.write_text(
        f"#!/bin/bash\n{sys.executable} -m megatron_ft merge --prefixes {prefixes} --output $PWD/all-train\n"
    )
    first = cluster.submit(array, cwd=folder, array=f"0-{PARTS - 1}", requeue=True)
    then = cluster.submit(merge, cwd=folder, dependency=f"afterok:{first}")
    for part in range(PARTS):
        task = f"{first}_{part}"
        cluster.wait_for(task, lambda _, n=part: (folder / f"written-{n}").exists(), 90, "has not written its shards")
        before = (folder / f"{part}-train-text.bin").stat()
        cluster.run("scontrol", "requeue", task)
        cluster.wait_for(task, lambda fields: fields["JobState"] in ENDED, 120, "has not ended")
        fields = cluster.show(task)
        assert (fields["JobState"], fields["ExitCode"], fields["Restarts"]) == ("COMPLETED", "0:0", "1")
        assert (folder / f"{part}-train-text.bin").stat() == before
    assert cluster.wait(then, 90) == ("COMPLETED", "0:0"), cluster.output(then)
    assert (folder / "all-train-text.bin").stat().st_size == sum(
        (folder / f"{part}-train-text.bin").stat().st_size for part in range(PARTS)
    )
    shutil.rmtree(folder)
