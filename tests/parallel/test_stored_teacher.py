"""A stored teacher: written by any layout, read by any; all k equal the resident one; what does not fit is refused in one line."""

import json
import shutil

import numpy as np
import pytest

from tests.parallel.jobs import SEQ_LENGTH, VOCAB, finetune, make_llama, read_metrics, to_checkpoint

SIZES = {"hidden_size": 96, "intermediate_size": 224, "num_hidden_layers": 8}


@pytest.fixture(scope="module")
def teacher(tmp_path_factory):
    folder = tmp_path_factory.mktemp("teacher")
    return to_checkpoint(make_llama(folder / "hf", **SIZES), folder / "checkpoint", "torch_dist", 1, 1)


def score(layout, load, shards, output, flags):
    """`megatron-ft score` as a rank runs it; the user's error, or None."""
    from megatron_ft.commands.generate import GenerationLayout
    from megatron_ft.commands.score import Score, run
    from megatron_ft.config.sections import Processes
    from megatron_ft.errors import UserError

    options = Score(**({"load": load, "data_path": [shards], "output": [output], "seq_length": SEQ_LENGTH} | flags))
    try:
        run(options, GenerationLayout(*layout), Processes())
    except UserError as error:
        return str(error)
    return None


def train(layout, load, shards, save, flags):
    """A run of three steps; the user's error, or None."""
    from megatron_ft.errors import UserError

    try:
        finetune(layout, load=load, data_path=[shards], save=save, train_iters=3, report=False, **flags)
    except UserError as error:
        return str(error)
    return None


@pytest.fixture(scope="module")
def stored(four_ranks, teacher, shards, tmp_path_factory):
    """k -> prefix of what TP2 x PP2 wrote."""
    folder = tmp_path_factory.mktemp("stored")
    for k in (8, VOCAB):
        four_ranks.run(score, (2, 2), teacher, shards, str(folder / f"k{k}"), {"top_k": k})
    return folder


def test_every_layout_writes_the_same(one_rank, stored, teacher, shards, tmp_path):
    from megatron_ft.data.shards import open_shards
    from megatron_ft.data.teacher_logits import TeacherLogits

    assert one_rank.run(score, (1, 1), teacher, shards, str(tmp_path / "k8"), {"top_k": 8}) == [None]
    one, four = TeacherLogits(str(tmp_path / "k8")), TeacherLogits(str(stored / "k8"))
    opened = open_shards(shards)
    for each in (one, four):
        each.verify()
        each.check(opened, VOCAB, SEQ_LENGTH, "cut", 1.0)
    for sample in range(0, 120, 7):
        count = min(len(opened.tokens(sample)), SEQ_LENGTH + 1) - 1
        mine, theirs = one.rows(sample, 1, count), four.rows(sample, 1, count)
        assert (mine["ids"] == theirs["ids"]).mean() > 0.99
        np.testing.assert_allclose(mine["log_probs"], theirs["log_probs"], atol=8e-3)
        np.testing.assert_allclose(mine["tail"], theirs["tail"], atol=1e-5)
        sums = np.exp(mine["log_probs"].astype(float)).sum(1) + mine["tail"]
        np.testing.assert_allclose(sums, 1, atol=2e-3)
    first, other = (json.loads((folder / "k8-teacher.json").read_text()) for folder in (tmp_path, stored))
    assert first["teacher"] == other["teacher"] and first["shards"] == other["shards"]


LAYOUTS = {"TP2xPP2": ((2, 2), {}), "PP2, interleaved": ((1, 2), {"virtual_pipeline_model_parallel_size": 2})}


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.works("stored teacher", "packing", ["SP", "PP", "VPP"])
def test_all_k_are_the_resident_teacher(layout, four_ranks, checkpoint, stored, teacher, shards, tmp_path):
    parallel, flags = LAYOUTS[layout]
    found = {}
    for name, more in (("resident", {"teacher": teacher}), ("stored", {"teacher_logits": [str(stored / f"k{VOCAB}")]})):
        assert four_ranks.run(train, parallel, checkpoint, shards, str(tmp_path / name), flags | more)[0] is None
        found[name] = {
            key: read_metrics(tmp_path / name, f"train/{key}")
            for key in ("ce", "kl", "kl_by_role/assistant", "grad_norm")
        }
    for key, values in found["resident"].items():
        np.testing.assert_allclose(found["stored"][key], values, rtol=1e-3, err_msg=key)
    (start,) = json.loads((tmp_path / "stored" / "run.json").read_text())["starts"]
    assert start["teacher"]["stored"][0]["teacher"]["weights"] and start["teacher"]["stored"][0]["digest"]


@pytest.mark.works("stored teacher", ["packing", "padded rows"])
def test_the_tail_bucket_bounds_the_divergence_from_below(one_rank, checkpoint, stored, shards, tmp_path):
    """k = 8 of a nearly flat distribution: less is seen, never more; unpacked rows read the same."""
    kl = {}
    for k in (8, VOCAB):
        for packing in (True, False):
            save = tmp_path / f"{k}{packing}"
            flags = {"teacher_logits": [str(stored / f"k{k}")], "packing": packing}
            assert one_rank.run(train, (1, 1), checkpoint, shards, str(save), flags) == [None]
            kl[k, packing] = read_metrics(save, "train/kl")[0]
    assert 0 < kl[8, True] < kl[VOCAB, True] and 0 < kl[8, False] < kl[VOCAB, False]


@pytest.mark.refuses(
    "stored teacher", "teacher", says="--teacher and --teacher_logits both give the teacher's distribution"
)
def test_what_does_not_fit_is_refused(one_rank, checkpoint, stored, teacher, shards, tmp_path):
    def error(prefix, **flags):
        (found,) = one_rank.run(train, (1, 1), checkpoint, shards, None, {"teacher_logits": [str(prefix)], **flags})
        assert found and "\n" not in found, found
        return found

    good = stored / "k8"
    assert "made with --seq_length 64, this run has 32" in error(good, seq_length=32)
    assert "made with --over_long cut, this run has split" in error(good, over_long="split")
    assert "made with --kd_temperature 1.0, this run has 2.0" in error(good, kd_temperature=2.0)
    assert "no such file; give the prefix that megatron-ft score wrote" in error(tmp_path / "nothing")
    assert "drop one of them" in error(good, teacher=teacher)
    for damage, message in (
        (lambda rows, text: rows.write_bytes(rows.read_bytes()[:-1]), "bytes, written with"),
        (lambda rows, text: rows.write_bytes(b"x" + rows.read_bytes()[1:]), "not those that were written"),
        (lambda rows, text: text.write_text(text.read_text().replace('"top_k": 8', '"top_k": 9')), "has been changed"),
        (lambda rows, text: text.write_text("{"), "not a readable description"),
        (lambda rows, text: rows.unlink(), "cannot be read"),
    ):
        for ending in ("bin", "json"):
            shutil.copy(f"{good}-teacher.{ending}", tmp_path / f"bad-teacher.{ending}")
        damage(tmp_path / "bad-teacher.bin", tmp_path / "bad-teacher.json")
        assert message in error(tmp_path / "bad")


def test_other_shards_and_teachers_that_cannot_score(one_rank, checkpoint, stored, teacher, shards, tmp_path):
    from megatron_ft.data.roles import ASSISTANT
    from megatron_ft.data.shards import ShardWriter

    with ShardWriter(tmp_path / "other-train", VOCAB) as writer:
        writer.add(np.arange(40), np.full(40, ASSISTANT, np.uint8))
    other = str(tmp_path / "other-train")
    (error,) = one_rank.run(train, (1, 1), checkpoint, other, None, {"teacher_logits": [str(stored / "k8")]})
    assert "belongs to other shards than" in error
    for flags, message in (
        ({"top_k": VOCAB + 1}, "more than the vocabulary's 203"),
        ({"top_k": 0}, "--top_k 0: must be at least 1"),
        ({"seq_length": 512}, "beyond the teacher's 256 positions"),
        ({"load": str(tmp_path / "nothing")}, "no such folder"),
    ):
        (error,) = one_rank.run(score, (1, 1), teacher, other, other, flags)
        assert message in error and "\n" not in error
    assert not list(tmp_path.glob("*teacher*"))
