"""What can go wrong with the checkpoints of a run, each put there on purpose: what is refused, in which words, and what is used instead."""

import errno
import fcntl
import json
import os
import pickle
import shutil
from pathlib import Path

import pytest
import torch

from megatron_ft.digests import MANIFEST, check_digests, write_digests
from tests.parallel.jobs import attempt


@pytest.fixture(scope="module")
def run(one_rank, checkpoint, shards, tmp_path_factory):
    """A run of four steps with a checkpoint after each second one, and its losses. Only copies are damaged."""
    folder = tmp_path_factory.mktemp("saved") / "run"
    assert one_rank.run(attempt, checkpoint, shards, str(folder), 4, {"save_interval": 2})[0]["error"] is None
    assert names(folder) == ["iter_0000002", "iter_0000004"]
    return folder


@pytest.fixture
def again(run, one_rank, checkpoint, shards, tmp_path):
    """Copy the run, let something happen to it, resume it to step 6: (what was said, the copy's folder)."""

    def resume(damage=lambda folder: None, **settings):
        copy = tmp_path / "run"
        shutil.copytree(run, copy)
        damage(copy)
        return one_rank.run(attempt, checkpoint, shards, str(copy), 6, {"auto_resume": True} | settings)[0], copy

    return resume


def flip(name, at=0.5):
    """Damage: one bit of a file of the newest checkpoint."""

    def damage(folder):
        path = next((folder / "iter_0000004").glob(name))
        data = bytearray(path.read_bytes())
        data[int(len(data) * at)] ^= 4
        path.write_bytes(data)

    return damage


def remove(name):
    return lambda folder: next((folder / "iter_0000004").glob(name)).unlink()


def cut(name):
    def damage(folder):
        path = next((folder / "iter_0000004").glob(name))
        path.write_bytes(path.read_bytes()[:-7])

    return damage


DAMAGES = {
    "a bit of a shard": (flip("__0_0.distcp"), "__0_0.distcp is damaged"),
    "a bit of the metadata": (flip(".metadata"), r"\.metadata is damaged"),
    "a bit of common.pt": (flip("common.pt", 0.3), "common.pt is damaged"),
    "a bit of the settings": (flip("training.yaml"), "training.yaml is damaged"),
    "a bit of the manifest": (flip(MANIFEST), "digests.json is damaged"),
    "no shard": (remove("__0_0.distcp"), "__0_0.distcp is missing"),
    "no metadata": (remove(".metadata"), r"\.metadata is missing"),
    "no manifest": (remove(MANIFEST), "digests.json is missing"),
    "no config": (remove("config.json"), "config.json is missing"),
    "a bit of the config": (flip("config.json", 0.1), "config.json is damaged"),
    "a shard cut short": (cut("__0_0.distcp"), "__0_0.distcp has .* it is cut short"),
    "a config cut short": (cut("config.json"), "config.json has .* it is cut short"),
}


@pytest.mark.parametrize("kind", DAMAGES)
def test_damage_is_named_and_the_one_before_used(kind, again, run):
    damage, message = DAMAGES[kind]
    said, folder = again(damage)
    assert said["error"] is None
    assert_said(said, "CHECKPOINT NOT USED: .*" + message)
    assert_said(said, "falling back to the checkpoint before: .*iter_0000002")
    assert by_iteration(folder, 4) == by_iteration(run, 4)
    assert tracker(folder) == "6"
    check_digests(folder / "iter_0000006")


def test_without_verification_a_flipped_bit_is_loaded(again):
    """What the digests are for: the engine has none."""
    said, _ = again(flip("__0_0.distcp", 0.9), verify_checkpoint=False)
    assert said["error"] is None and "CHECKPOINT NOT USED" not in said["log"]


def test_all_damaged(again):
    """Nothing is used, nothing deleted; the newest one's fault is the message."""

    def damage(folder):
        flip("__0_0.distcp")(folder)
        (folder / "iter_0000002" / "common.pt").unlink()

    said, folder = again(damage)
    assert "iter_0000004/__0_0.distcp is damaged" in said["error"]
    assert names(folder) == ["iter_0000002", "iter_0000004"] and tracker(folder) == "4"


@pytest.mark.parametrize(
    "text", ["", "\x00\x17garbage", "latest", "99999"], ids=["empty", "garbled", "a word", "nowhere"]
)
def test_a_tracker_that_says_nothing(again, text):
    said, folder = again(lambda folder: (folder / "latest_checkpointed_iteration.txt").write_text(text))
    assert said["error"] is None
    assert_said(said, "the newest complete one is used")
    assert_said(said, "resuming at iteration 4")
    assert tracker(folder) == "6"


def test_a_tracker_that_points_back_is_obeyed(again):
    said, _ = again(lambda folder: (folder / "latest_checkpointed_iteration.txt").write_text("2\n"))
    assert_said(said, "resuming at iteration 2")


def test_no_tracker(again):
    said, _ = again(lambda folder: (folder / "latest_checkpointed_iteration.txt").unlink())
    assert_said(said, "resuming at iteration 4")


def test_a_checkpoint_named_by_itself_has_none_before(run, one_rank, shards, tmp_path):
    shutil.copytree(run / "iter_0000004", tmp_path / "iter_0000004")
    flip("__0_0.distcp")(tmp_path)
    said = one_rank.run(attempt, str(tmp_path / "iter_0000004"), shards, None, 6, {})[0]
    assert "__0_0.distcp is damaged: its digest is not the one that was written" in said["error"]


def test_a_checkpoint_without_digests_is_loaded_with_a_word(again):
    def damage(folder):
        (folder / "iter_0000004" / MANIFEST).unlink()
        config = folder / "iter_0000004" / "config.json"
        config.write_text(json.dumps(json.loads(config.read_text()) | {"digested": False}))

    said, _ = again(damage)
    assert_said(said, "has no digests .* its content is not verified")
    assert_said(said, "resuming at iteration 4")


class Payload:
    """Unpickled freely it leaves a file."""

    def __init__(self, mark: Path):
        self.mark = mark

    def __reduce__(self):
        return os.mkdir, (str(self.mark),)


def plant(name, mark):
    """Damage: a pickle that runs, in place of a file of the newest checkpoint; with digests that vouch for it."""

    def damage(folder):
        path = folder / "iter_0000004" / name
        if name.endswith(".pt"):
            torch.save({"progress": Payload(mark)}, path)
        elif name == ".metadata":
            path.write_bytes(pickle.dumps(Payload(mark)))
        write_digests(folder / "iter_0000004")

    return damage


@pytest.mark.parametrize("name", ["common.pt", ".metadata"])
def test_a_planted_pickle_does_not_run(name, again, tmp_path):
    said, _ = again(plant(name, tmp_path / "ran"))
    assert_said(said, f"CHECKPOINT NOT USED: .*{name}.*(names objects|it names)")
    assert_said(said, "resuming at iteration 2")
    assert not (tmp_path / "ran").exists()


def test_a_planted_pickle_among_the_tensors_does_not_run(again, tmp_path):
    """An object where the engine unpickles freely: every shard's first record."""

    def damage(folder):
        target = folder / "iter_0000004" / "__0_0.distcp"
        data = target.read_bytes()
        payload = pickle.dumps(Payload(tmp_path / "ran"))
        target.write_bytes(payload + data[len(payload) :])
        write_digests(folder / "iter_0000004")

    said, _ = again(damage)
    assert said["error"] and "iter_0000004" in said["error"]
    assert not (tmp_path / "ran").exists()


def test_a_foreign_file_in_the_folder_is_said_and_not_read(again, tmp_path):
    def damage(folder):
        (folder / "iter_0000004" / "extra.pkl").write_bytes(pickle.dumps(Payload(tmp_path / "ran")))

    said, _ = again(damage)
    assert_said(said, "holds extra.pkl .* which its save did not write: not read")
    assert_said(said, "resuming at iteration 4")
    assert not (tmp_path / "ran").exists()


def test_another_precision_is_not_cast_in_silence(again):
    said, folder = again(bf16=True)
    assert "stored in float32, this run computes in bfloat16" in said["error"] and "--finetune" in said["error"]
    assert names(folder) == ["iter_0000002", "iter_0000004"]


@pytest.mark.parametrize("change", [{"ffn_hidden_size": 128}, {"num_query_groups": 2}, {"num_layers": 2}], ids=str)
def test_a_checkpoint_of_another_model(change, again, checkpoint):
    """In the newest folder, with digests that vouch for it: not used, whether the model the run began from is at hand or not."""

    def damage(folder):
        config = folder / "iter_0000004" / "config.json"
        said = json.loads(config.read_text())
        said["architecture"] |= change
        config.write_text(json.dumps(said))
        write_digests(folder / "iter_0000004")

    said, _ = again(damage)
    assert_said(said, "CHECKPOINT NOT USED: .*iter_0000004.* another model")
    assert_said(said, "resuming at iteration 2")


def test_a_config_that_disagrees_with_its_tensors(run, one_rank, shards, tmp_path):
    shutil.copytree(run / "iter_0000004", tmp_path / "iter_0000004")
    config = tmp_path / "iter_0000004" / "config.json"
    said = json.loads(config.read_text())
    said["architecture"]["ffn_hidden_size"] = 128
    config.write_text(json.dumps(said))
    write_digests(tmp_path / "iter_0000004")
    said = one_rank.run(attempt, str(tmp_path / "iter_0000004"), shards, None, 6, {})[0]
    assert (
        "linear_fc1.weight is [320, 64], its config.json says [256, 64]: its tensors are those of another model"
        in said["error"]
    )


def test_the_folder_is_another_jobs(again, run, checkpoint, shards, one_rank, tmp_path, monkeypatch):
    """While one holds --save, a second is refused before it writes anything; afterwards it is let in."""
    copy = tmp_path / "theirs"
    shutil.copytree(run, copy)
    with open(copy / ".lock", "a+") as file:
        file.write(json.dumps({"host": "node3", "pid": 12, "job": None}))
        file.flush()
        fcntl.flock(file, fcntl.LOCK_EX)
        before = {path: path.stat().st_mtime_ns for path in copy.rglob("*")}
        said = one_rank.run(attempt, checkpoint, shards, str(copy), 6, {"auto_resume": True, "patience": 0.1})[0]
        assert "theirs is in use by another job (process 12 on node3): use another --save folder" in said["error"]
        assert {path: path.stat().st_mtime_ns for path in copy.rglob("*")} == before
    assert one_rank.run(attempt, checkpoint, shards, str(copy), 6, {"auto_resume": True})[0]["error"] is None


def test_what_a_killed_save_left_is_swept(again):
    def damage(folder):
        (folder / ".iter_0000005.tmp-1-abc").mkdir()
        (folder / ".iter_0000005.tmp-1-abc" / "__0_0.distcp").write_bytes(b"x")
        (folder / ".latest_checkpointed_iteration.txt.tmp-1-abc").touch()

    said, folder = again(damage)
    assert_said(said, "removing .iter_0000005.tmp-1-abc, which an unfinished save left")
    assert not list(folder.glob(".*tmp-*"))


def test_newest_and_milestones_are_kept(one_rank, checkpoint, shards, tmp_path):
    keep = {"save_interval": 1, "keep_last": 2, "save_retain_interval": 3}
    one_rank.run(attempt, checkpoint, shards, str(tmp_path / "run"), 8, keep)
    assert names(tmp_path / "run") == ["iter_0000003", "iter_0000006", "iter_0000007", "iter_0000008"]


@pytest.mark.parametrize("number", [errno.ENOSPC, errno.EIO])
@pytest.mark.parametrize("asynchronous", [False, True], ids=["here", "in the background"])
def test_a_disk_that_refuses(number, asynchronous, one_rank, checkpoint, shards, tmp_path):
    """The second save cannot be written: one line, the first checkpoint is whole and named by the tracker, no leftovers."""
    settings = {"save_interval": 2, "refuse": (2, number), "async_save": asynchronous}
    said = one_rank.run(attempt, checkpoint, shards, str(tmp_path / "run"), 6, settings)[0]
    assert os.strerror(number).lower() in said["error"] and "run the same command again" in said["error"]
    assert names(tmp_path / "run") == ["iter_0000002"] and tracker(tmp_path / "run") == "2"
    assert not list((tmp_path / "run").glob(".iter*"))
    check_digests(tmp_path / "run" / "iter_0000002")


def test_a_folder_that_cannot_be_written(run, one_rank, checkpoint, shards, tmp_path):
    (tmp_path / "file").touch()
    said = one_rank.run(attempt, checkpoint, shards, str(tmp_path / "file" / "run"), 4, {})[0]
    assert "--save" in said["error"] and "file is not a folder" in said["error"]


def test_a_background_writer_that_dies(four_ranks, checkpoint, shards, tmp_path):
    """Of four ranks' writers one is killed while it writes: all ranks end after the step in which that happens, in the same words; the
    checkpoint before is whole.
    """
    settings = {"save_interval": 2, "async_save": True, "kill_writer": (2, 4), "use_distributed_optimizer": True}
    said = four_ranks.run(attempt, checkpoint, shards, str(tmp_path / "run"), 12, settings, (2, 1))
    assert {one["error"] for one in said} == {said[0]["error"]}
    assert "in the background ended with signal 9 (SIGKILL): earlier checkpoints are intact" in said[0]["error"]
    assert [one["steps"] for one in said] == [5] * 4
    assert names(tmp_path / "run") == ["iter_0000002"] and tracker(tmp_path / "run") == "2"
    assert not list((tmp_path / "run").glob(".iter*"))


def names(folder):
    return sorted(path.name for path in folder.glob("iter_*"))


def tracker(folder):
    return (folder / "latest_checkpointed_iteration.txt").read_text().strip()


def by_iteration(folder, last):
    """Iteration -> loss up to `last`; of an iteration done twice the later one."""
    lines = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    return {
        line["iteration"]: line["train/loss"] for line in lines if "train/loss" in line and line["iteration"] <= last
    }


def assert_said(said, pattern):
    import re

    assert re.search(pattern, said["log"]), said


def test_the_tokenizer_outlives_the_checkpoint_it_came_from(again):
    """The folder that a run resumed from is deleted by --keep_last; later checkpoints have the tokenizer all the same."""

    def give(folder):
        for where in folder.glob("iter_*"):
            (where / "tokenizer").mkdir()
            (where / "tokenizer" / "tokenizer.model").write_bytes(b"pieces")
            write_digests(where)

    said, folder = again(give, save_interval=1, keep_last=1)
    assert said["error"] is None and names(folder) == ["iter_0000006"]
    assert (folder / "iter_0000006" / "tokenizer" / "tokenizer.model").read_bytes() == b"pieces"
