"""`megatron-ft score` that is killed goes on where it was, to the byte; shards of other tools are scored too."""

import contextlib
import json
import os
import shutil
import signal
from pathlib import Path
from unittest import mock

import numpy as np
import pytest

from tests.parallel.jobs import SEQ_LENGTH, VOCAB, make_llama, read_metrics, to_checkpoint
from tests.parallel.test_stored_teacher import score, train
from tests.ranks import RankFailed, Ranks

FLAGS = {"top_k": 8, "batch_size": 4}


@pytest.fixture(scope="module")
def teacher(tmp_path_factory):
    folder = tmp_path_factory.mktemp("teacher")
    return to_checkpoint(make_llama(folder / "hf"), folder / "checkpoint", "torch_dist", 1, 1)


@pytest.fixture(scope="module")
def straight(one_rank, teacher, shards, tmp_path_factory):
    """Prefix of what a run wrote that nothing stopped."""
    prefix = tmp_path_factory.mktemp("straight") / "k8"
    assert one_rank.run(score, (1, 1), teacher, shards, str(prefix), FLAGS) == [None]
    assert sorted(path.name for path in prefix.parent.iterdir()) == ["k8-teacher.bin", "k8-teacher.json"]
    return prefix


def die(*_args, **_options):
    os.kill(os.getpid(), signal.SIGKILL)


def killed_at(place, count, *arguments):
    """Score, and kill this process by SIGKILL at the `count`-th call of a function, before or halfway through it."""
    from megatron_ft.data import teacher_logits, unfinished_logits

    calls = []
    owner, name = {
        "prefilling": (unfinished_logits, "_write_unknown"),
        "rows": (os, "pwrite"),
        "half the rows": (os, "pwrite"),
        "note": (unfinished_logits.Journal, "write"),
        "renaming": (unfinished_logits, "rows_path"),
        "describing": (unfinished_logits, "write_description"),
        "removing": (unfinished_logits.Unfinished, "discard"),
        "half the description": (teacher_logits.files, "write_json"),
    }[place]
    real = getattr(owner, name)

    def counted(*args, **options):
        calls.append(args)
        if len(calls) < count:
            return real(*args, **options)
        if place == "half the rows":
            real(args[0], args[1][: len(args[1]) // 2], args[2])
        return die()

    with mock.patch.object(owner, name, counted):
        return score(*arguments)


def looks_finished(prefix) -> bool:
    return Path(f"{prefix}-teacher.json").exists()


KILLS = [
    ("prefilling", 1), ("rows", 1), ("half the rows", 7), ("rows", 40), ("note", 60), ("renaming", 2), ("describing", 1),
    ("half the description", 2),
]  # fmt: skip


@pytest.mark.parametrize(("place", "count"), KILLS)
def test_killed_anywhere_and_finished_to_the_byte(place, count, straight, one_rank, teacher, shards, tmp_path, capfd):
    output = tmp_path / "k8"
    with contextlib.closing(Ranks(1)) as ranks, pytest.raises(RankFailed):
        ranks.run(killed_at, place, count, (1, 1), teacher, shards, str(output), FLAGS)
    assert not looks_finished(output) and list(tmp_path.glob(".k8-teacher.unfinished"))
    assert one_rank.run(score, (1, 1), teacher, shards, str(output), FLAGS) == [None]
    assert same_files(straight, output) and not list(tmp_path.glob(".*"))


def same_files(one, other) -> bool:
    return all(
        Path(f"{one}-teacher.{end}").read_bytes() == Path(f"{other}-teacher.{end}").read_bytes() for end in ("bin", "json")
    )  # fmt: skip


def test_only_what_is_left_is_computed(one_rank, straight, teacher, shards, tmp_path):
    """Also in another layout with another batch; then nothing is."""
    with contextlib.closing(Ranks(1)) as ranks, pytest.raises(RankFailed):
        ranks.run(killed_at, "rows", 61, (1, 1), teacher, shards, str(tmp_path / "k8"), FLAGS)
    with contextlib.closing(Ranks(4)) as ranks:
        counts = ranks.run(counted, (2, 1), teacher, shards, str(tmp_path / "k8"), FLAGS | {"batch_size": 16})
        again = ranks.run(counted, (2, 1), teacher, shards, str(tmp_path / "k8"), FLAGS)
    assert counts[0] == counts[1] and counts[2] == counts[3]  # of two tensor-parallel ranks each
    assert 60 <= counts[0] + counts[2] <= 60 + 16 and again == [0] * 4
    one, other = (np.fromfile(f"{p}-teacher.bin", kind()) for p in (straight, tmp_path / "k8"))
    assert (one["ids"] == other["ids"]).mean() > 0.99
    np.testing.assert_allclose(one["tail"], other["tail"], atol=1e-5)


def kind():
    from megatron_ft.data.teacher_logits import row_type

    return row_type(8, VOCAB)


def counted(*arguments):
    """Rows that this rank's model computed."""
    from megatron_ft.evaluation.scoring import Scorer

    real, found = Scorer.of_tokens, []

    def of_tokens(scorer, rows):
        found.append(len(rows))
        return real(scorer, rows)

    with mock.patch.object(Scorer, "of_tokens", of_tokens):
        assert score(*arguments) is None
    return sum(found)


def test_damaged_rows_and_other_settings_are_computed_again(one_rank, straight, teacher, shards, tmp_path):
    def killed(**flags):
        with contextlib.closing(Ranks(1)) as ranks, pytest.raises(RankFailed):
            ranks.run(killed_at, "rows", 100, (1, 1), teacher, shards, str(tmp_path / "k8"), FLAGS | flags)

    killed()
    rows = tmp_path / ".k8-teacher.unfinished" / "rows.bin"
    data = bytearray(rows.read_bytes())
    middle = len(data) // 2
    data[middle : middle + 4096] = bytes(4096)  # a page that a disk has lost
    rows.write_bytes(data)
    (note,) = rows.parent.glob("done-*")
    note.write_bytes(note.read_bytes()[:-5])  # a note that was cut off
    (computed,) = one_rank.run(counted, (1, 1), teacher, shards, str(tmp_path / "k8"), FLAGS)
    assert 21 < computed < 120 and same_files(straight, tmp_path / "k8")
    for ending in ("bin", "json"):
        (tmp_path / f"k8-teacher.{ending}").unlink()
    killed(kd_temperature=2.0)
    assert one_rank.run(counted, (1, 1), teacher, shards, str(tmp_path / "k8"), FLAGS) == [120]
    assert same_files(straight, tmp_path / "k8")


def test_a_finished_file_that_was_damaged_is_made_again(one_rank, straight, teacher, shards, tmp_path):
    for ending in ("bin", "json"):
        shutil.copy(f"{straight}-teacher.{ending}", tmp_path / f"k8-teacher.{ending}")
    assert one_rank.run(counted, (1, 1), teacher, shards, str(tmp_path / "k8"), FLAGS) == [0]
    (tmp_path / "k8-teacher.bin").write_bytes(b"x" + (tmp_path / "k8-teacher.bin").read_bytes()[1:])
    assert one_rank.run(counted, (1, 1), teacher, shards, str(tmp_path / "k8"), FLAGS) == [120]
    assert same_files(straight, tmp_path / "k8")


def test_two_at_once_are_refused(one_rank, teacher, shards, tmp_path):
    import fcntl

    folder = tmp_path / ".k8-teacher.unfinished"
    folder.mkdir()
    with open(folder / "lock", "a+b") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        (error,) = one_rank.run(score, (1, 1), teacher, shards, str(tmp_path / "k8"), FLAGS)
    assert "another megatron-ft score writes there" in error and "\n" not in error


@pytest.fixture(scope="module")
def foreign(shards, tmp_path_factory):
    """The same chats as Open-Assistant's pretokenizer writes them: no manifest, roles of two bytes, documents never ended."""
    from megatron_ft.data.mmididx import write_index
    from megatron_ft.data.shards import open_shards

    folder, opened = tmp_path_factory.mktemp("foreign"), open_shards(shards)
    for name, values in (("text", opened.tokens), ("role", opened.role_bytes)):
        data = [np.asarray(values(n)).astype(np.uint16) for n in range(len(opened))]
        (folder / f"chats-{name}.bin").write_bytes(np.concatenate(data).tobytes())
        with open(folder / f"chats-{name}.idx", "wb") as file:
            write_index(file, np.array([len(x) for x in data]), np.dtype(np.uint16))
    return str(folder / "chats")


@pytest.fixture(scope="module")
def plain(shards, tmp_path_factory):
    """Their tokens as Megatron's preprocessing writes them."""
    from megatron_ft.data.mmididx import write_index
    from megatron_ft.data.shards import open_shards

    folder, opened = tmp_path_factory.mktemp("plain"), open_shards(shards)
    data = [np.asarray(opened.tokens(n)).astype(np.uint16) for n in range(len(opened))]
    (folder / "docs.bin").write_bytes(np.concatenate(data).tobytes())
    with open(folder / "docs.idx", "wb") as file:
        write_index(file, np.array([len(x) for x in data]), np.dtype(np.uint16))
    return str(folder / "docs")


def test_shards_of_other_tools_have_the_same_rows(
    one_rank, straight, checkpoint, teacher, shards, foreign, plain, tmp_path
):
    """And finetune distils from them as from ours: the same first loss; of plain text both parts of --split are scored."""
    for name, prefix in (("foreign", foreign), ("plain", plain)):
        assert one_rank.run(score, (1, 1), teacher, prefix, str(tmp_path / name), FLAGS) == [None]
        assert Path(f"{straight}-teacher.bin").read_bytes() == (tmp_path / f"{name}-teacher.bin").read_bytes()
    losses = {}
    for name, prefix, stored in (("ours", shards, straight), ("foreign", foreign, tmp_path / "foreign")):
        flags = {"teacher_logits": [str(stored)]}
        assert one_rank.run(train, (1, 1), checkpoint, prefix, str(tmp_path / f"run-{name}"), flags) == [None]
        losses[name] = read_metrics(tmp_path / f"run-{name}", "train/kl")
    assert losses["ours"] == losses["foreign"] and len(losses["ours"]) == 3
    for ending in ("bin", "json"):  # beside the shards, where the validation part looks for them
        shutil.copy(tmp_path / f"plain-teacher.{ending}", f"{plain}-teacher.{ending}")
    flags = {"teacher_logits": [plain], "split": "60,40,0", "eval_interval": 2, "eval_iters": 1}
    assert one_rank.run(train, (1, 1), checkpoint, plain, str(tmp_path / "run-plain"), flags) == [None]
    assert read_metrics(tmp_path / "run-plain", "eval/kl")
    (error,) = one_rank.run(train, (1, 1), checkpoint, foreign, None, {"teacher_logits": [str(straight)]})
    assert "belongs to other shards than" in error


def test_a_part_of_plain_shards_reads_its_own_rows(one_rank, teacher, plain, tmp_path):
    """The second part begins in the middle of the file."""
    from megatron_ft.data.plain import PlainShards
    from megatron_ft.data.teacher_logits import TeacherLogits

    assert one_rank.run(score, (1, 1), teacher, plain, str(tmp_path / "k8"), FLAGS) == [None]
    whole, part = PlainShards(plain, VOCAB), PlainShards(plain, VOCAB, ((60.0, 40.0, 0.0), 1))
    found = []
    for shards in (whole, part):
        stored = TeacherLogits(str(tmp_path / "k8"))
        stored.check(shards, VOCAB, SEQ_LENGTH, "cut", 1.0)
        found.append(stored.rows(len(shards) - 1, 1, 5))
    assert len(part) < len(whole) and found[0].tobytes() == found[1].tobytes()


def test_ids_outside_the_teachers_vocabulary_leave_nothing(one_rank, teacher, plain, tmp_path):
    for ending in ("bin", "idx"):
        shutil.copy(f"{plain}.{ending}", tmp_path / f"docs.{ending}")
    data = np.fromfile(tmp_path / "docs.bin", np.uint16)
    data[5] = 60000
    data.tofile(tmp_path / "docs.bin")
    (error,) = one_rank.run(score, (1, 1), teacher, str(tmp_path / "docs"), str(tmp_path / "k8"), FLAGS)
    assert "holds id 60000" in error and not list(tmp_path.glob("*teacher*")) and not list(tmp_path.glob(".*"))


def test_the_description_names_what_it_did(straight):
    found = json.loads(Path(f"{straight}-teacher.json").read_text())
    assert set(found) == {
        "format_version", "teacher", "tokenizer", "rope", "size", "vocab_size", "top_k", "seq_length", "over_long",
        "temperature", "precision", "shards", "tokens", "digest", "own_digest",
    }  # fmt: skip
