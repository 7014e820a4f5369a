"""--rehearse and --dry_run: alone and under a batch script, with what is there and with what is not; nothing is left behind."""

import os
import subprocess

from tests.errors.conftest import ROOT, finetune
from tests.errors.test_before_torch import layout
from tests.errors.test_launcher import PLAIN, start


def temporary(tmp_path) -> dict[str, str]:
    """A place of its own for temporary files, so that what is left there is seen."""
    (tmp_path / "tmp").mkdir()
    return {"TMPDIR": str(tmp_path / "tmp")}


def assert_nothing_left(tmp_path) -> None:
    assert not list((tmp_path / "tmp").glob("megatron_ft*")) and [path.name for path in tmp_path.iterdir()] == ["tmp"]


def test_alone(shop, tmp_path):
    """A command for 2 machines x 2 processes on one; checkpoint and shards are there and read."""
    save = tmp_path / "run"
    more = (
        "--nnodes",
        2,
        "--nproc_per_node",
        2,
        "--node_rank",
        1,
        "--master_addr",
        "n1",
        "--master_port",
        1,
        "--save_interval",
        1000,
    )
    done = start(
        PLAIN,
        *finetune(shop, shop.split, None, save, *layout(2, 2), *more, "--rehearse", iters=5000),
        **temporary(tmp_path),
    )
    assert done.code == 0, done.err
    assert "rehearsal passed" in done.out and "4 processes found each other" in done.out
    assert "its files are there" in done.out and "54 samples" in done.out and "steps 5000 -> 3" in done.out
    assert "iteration 3/ 3" in done.out and done.out.count("saved checkpoint") == 2
    assert_nothing_left(tmp_path)


def test_what_is_missing_is_told_at_once(shop, tmp_path):
    words = finetune(
        shop, tmp_path / "model", tmp_path / "chats", tmp_path / "run", "--vocab_file", tmp_path / "t.model"
    )
    done = start(PLAIN, *words, "--rehearse", *layout(2, 2))
    assert done.code == 2 and not list(tmp_path.iterdir())
    (line,) = [line for line in done.err.splitlines() if "error" in line]
    assert "model: no such folder" in line and "t.model: no such file" in line and "--make_believe" in line


def test_made_up_under_the_batch_script(tmp_path):
    """Two nodes x two processes by the stand-in for SLURM; neither checkpoint nor shards are there yet."""
    environment = {
        **os.environ,
        "STAND_IN_NODES": "2",
        "GPUS_PER_NODE": "2",
        "SAVE": str(tmp_path / "run"),
        **temporary(tmp_path),
    }
    script = [
        str(ROOT / "examples/slurm/rehearse.sh"),
        str(ROOT / "examples/oasst_llama2_70b/stage2.sbatch"),
        "llama2-7b",
    ]
    sizes = ["--tensor_model_parallel_size", "2", "--pipeline_model_parallel_size", "2"]
    done = subprocess.run([*script, *sizes], cwd=ROOT, env=environment, capture_output=True, text=True, timeout=170)
    assert done.returncode == 0, done.stdout + done.stderr
    assert (
        "rehearsal passed" in done.stdout
        and "checkpoints/llama2-70b-tp8-pp4-oasst_pre10: NOT THERE, made up" in done.stdout
    )
    assert_nothing_left(tmp_path)


def test_dry_run(shop, tmp_path):
    """All but the steps, in every process; nothing is written."""
    done = start(
        PLAIN,
        *finetune(
            shop, shop.split, None, tmp_path / "run", *layout(2, 2), "--nproc_per_node", 4, "--dry_run", iters=900
        ),
    )
    assert done.code == 0, done.err
    assert "would train iterations 1 to 900" in done.out and "would save" in done.out and "iteration 1/" not in done.out
    assert not list(tmp_path.iterdir())
    done = start(PLAIN, *finetune(shop, shop.split, None, None, *layout(2, 1), "--dry_run"))
    assert done.code == 2  # the checkpoint is for another layout
