"""Kinds of teachers: in the classic format, in NF4; stored by an export; and what preflight and a rehearsal say of a teacher."""

import json
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file

from checkpoints_conversion.hf_to_megatron import HfToMegatron, convert
from tests.conversion.builders import make_sentencepiece
from tests.errors.conftest import engine_desk
from tests.parallel.jobs import SEQ_LENGTH, finetune, make_llama, read_metrics, to_checkpoint, to_hf
from tests.parallel.test_stored_teacher import score


@pytest.fixture(scope="module")
def hf(tmp_path_factory):
    """Wider, deeper, of the same vocabulary; its rows are whole blocks of NF4."""
    sizes = {"hidden_size": 128, "intermediate_size": 256, "num_hidden_layers": 8, "head_dim": 32}
    return make_llama(tmp_path_factory.mktemp("teachers") / "hf", **sizes)


@pytest.fixture(scope="module")
def teachers(hf):
    """name -> checkpoint of the same weights; plain: what is left of them in NF4, as numbers."""
    made = {"dist": to_checkpoint(hf, hf.parent / "dist", "torch_dist", 1, 1)}
    made["classic"] = to_checkpoint(hf, hf.parent / "classic", "torch", 2, 2)
    made["nf4"] = str(hf.parent / "nf4")
    convert(HfToMegatron(str(hf), made["nf4"], params_dtype="bf16", quantize="nf4"))
    to_hf(made["nf4"], hf.parent / "dequantised")
    made["plain"] = to_checkpoint(hf.parent / "dequantised", hf.parent / "plain", "torch_dist", 1, 1)
    return made


def train(layout, load, shards, save, flags):
    finetune(layout, load=load, data_path=[shards], save=save, train_iters=3, report=False, **flags)


@pytest.mark.parametrize("one, other, flags", [("dist", "classic", {}), ("plain", "nf4", {"bf16": True})])
def test_the_same_weights_stored_otherwise(one, other, flags, four_ranks, checkpoint, teachers, shards, tmp_path):
    found = {}
    for name in (one, other):
        four_ranks.run(train, (2, 2), checkpoint, shards, str(tmp_path / name), {"teacher": teachers[name], **flags})
        found[name] = [read_metrics(tmp_path / name, f"train/{key}") for key in ("ce", "kl")]
    assert found[one] == found[other] and found[one][1][0] > 0.1


def test_nf4_changes_the_teacher(hf, teachers):
    """Else the test above could not tell."""
    before, after = (load_file(hf.parent / name / "model.safetensors") for name in ("hf", "dequantised"))
    name = "model.layers.7.mlp.down_proj.weight"
    assert not torch.equal(before[name].bfloat16(), after[name].bfloat16())


@pytest.mark.parametrize("has_tokenizer", [True, False])
def test_an_export_is_scored_as_its_checkpoint(has_tokenizer, one_rank, hf, shards, tmp_path):
    model = shutil.copytree(hf, tmp_path / "export")
    if has_tokenizer:
        make_sentencepiece(model)
    loads = {"export": str(model), "checkpoint": to_checkpoint(model, tmp_path / "of it", "torch_dist", 1, 1)}
    found = []
    for name, load in loads.items():
        assert one_rank.run(score, (1, 1), load, shards, str(tmp_path / name), {"top_k": 8}) == [None]
        described = json.loads((tmp_path / f"{name}-teacher.json").read_text())
        assert described.pop("teacher")["weights"] and described.pop(
            "own_digest"
        )  # the path of the first is in the second
        found.append((described, (tmp_path / f"{name}-teacher.bin").read_bytes()))
    assert found[0] == found[1] and bool(found[0][0]["tokenizer"]) == has_tokenizer
    assert np.frombuffer(found[0][1], np.uint8).any()


def command(*words):
    return engine_desk()(*map(str, words), patience=150)


RUN = f"--seq_length {SEQ_LENGTH} --train_iters 3 --global_batch_size 4 --lr 1e-3"


@pytest.mark.parametrize("kind", ["dist", "nf4"])
def test_a_rehearsal_has_a_small_teacher(kind, checkpoint, teachers, shards, tmp_path):
    words = f"--tensor_model_parallel_size 2 --nproc_per_node 2 --rehearse {RUN}".split()
    done = command(
        "finetune", "--load", checkpoint, "--teacher", teachers[kind], "--data_path", shards, "--save", tmp_path / "run",
        *words,
    )  # fmt: skip
    assert done.code == 0, done.err
    (line,) = [line for line in done.out.splitlines() if "--teacher" in line and "all files exist" in line]
    assert "llama, layers 1-8" in line and "rehearsal passed" in done.out and "kl" in done.out.lower()
    assert not (tmp_path / "run").exists()


def test_a_rehearsal_without_the_teacher(checkpoint, shards, tmp_path):
    """It is missing: that is said at once; with --make_believe it is made up."""
    words = ["--load", checkpoint, "--teacher", tmp_path / "no", "--data_path", shards, "--rehearse", *RUN.split()]
    done = command("finetune", *words)
    assert done.code == 2 and f"--teacher: {tmp_path}/no: no such folder" in done.err and "Traceback" not in done.err


def test_preflight_checks_stored_logits(one_rank, checkpoint, teachers, shards, tmp_path):
    stored = str(tmp_path / "stored")
    assert one_rank.run(score, (1, 1), teachers["dist"], shards, stored, {"top_k": 8}) == [None]
    words = ["preflight", "--load", checkpoint, "--data_path", shards, "--teacher_logits"]
    good = command(*words, stored, *RUN.split())
    assert good.code == 0 and "stored-teacher.json: top 8 of a teacher, fits the shards and the run" in good.out
    for prefix, flags, message in (
        (stored, ["--kd_temperature", 2], "made with --kd_temperature 1.0, this run has 2.0"),
        (stored, ["--seq_length", 32], f"made with --seq_length {SEQ_LENGTH}, this run has 32"),
        (tmp_path / "no", [], "no such file; give the prefix that megatron-ft score wrote"),
    ):
        done = command(*words, prefix, *RUN.split(), *flags)
        (error,) = [line for line in done.out.splitlines() if line.startswith("error:")]
        assert done.code == 2 and message in error and error.endswith("(--teacher_logits)")
    Path(f"{stored}-teacher.bin").write_bytes(b"")
    assert command(*words, stored, *RUN.split()).code == 2
