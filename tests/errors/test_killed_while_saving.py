"""A run killed with SIGKILL while it saves: the checkpoint before is untouched, and resuming from it gives the run that was
never killed."""

import json

import pytest

from tests.errors.conftest import finetune

# Where the second save of a run is stopped: module, function in it, and at which call.
MOMENTS = {
    "a tensor file is being written": (
        "megatron.core.dist_checkpointing.strategies.filesystem_async",
        "_write_item",
        9,
    ),
    "tensors are written, nothing else": ("megatron_ft.checkpoints.training_state", "write_config", 1),
    "all files are there, their digests not": ("megatron_ft.checkpoints.saver", "write_manifest", 1),
    "the folder is to get its name": ("megatron_ft.files", "_take_place", 1),
    "the folder has its name, the tracker the old one": ("megatron_ft.checkpoints.saver", "write_tracker", 1),
    "the tracker is being replaced": ("os", "replace", -1),
}


@pytest.fixture(scope="module")
def straight(shop, engine, tmp_path_factory):
    """Losses of three steps that nobody disturbed."""
    save = tmp_path_factory.mktemp("straight") / "run"
    assert engine(*finetune(shop, save=save, iters=3)).code == 0
    return losses(save)


@pytest.mark.parametrize("moment", MOMENTS)
def test_the_checkpoint_before_is_resumed(moment, straight, shop, engine, tmp_path):
    run = tmp_path / "run"
    words = finetune(shop, None, None, run, "--save_interval", 1, iters=3)
    killed = engine(*words, hook="tests.errors.kill:arm", hook_args=[str(run), *MOMENTS[moment]])
    assert killed.code == -9, killed
    assert (run / "latest_checkpointed_iteration.txt").read_text() == "1\n"
    before = content(run / "iter_0000001")
    resumed = engine(*finetune(shop, run, None, run, "--save_interval", 1, iters=3))
    assert resumed.code == 0, resumed.err
    assert "resuming at iteration 1," in resumed.err
    assert not list(run.glob(".iter_*")), "what the killed save left is still there"
    assert content(run / "iter_0000001") == before
    assert (run / "latest_checkpointed_iteration.txt").read_text() == "3\n"
    assert losses(run) == straight


def content(folder) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def losses(run) -> dict[int, float]:
    """Iteration -> loss; of an iteration done twice the later one."""
    lines = map(json.loads, (run / "metrics.jsonl").read_text().splitlines())
    return {line["iteration"]: line["train/loss"] for line in lines if "train/loss" in line}
