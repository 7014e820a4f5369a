"""Which teachers fit: vocabulary, tokenizer, rows of the embedding, stages; found in config.json alone, before any process starts."""

import dataclasses

import pytest

from megatron_ft.checkpoints.folder import CheckpointConfig, write_config
from megatron_ft.commands import preflight
from megatron_ft.config.cli import run_script
from megatron_ft.config.sections import Parallelism
from megatron_ft.errors import ConfigError
from megatron_ft.models.pipeline import split_beside, split_layers
from megatron_ft.training.teacher import same_rows, same_vocabulary
from tests.training.test_datasets import write
from tests.training.test_rules import ARCH

STUDENT = CheckpointConfig(ARCH, "torch_dist", 1, 1, 128, "release", "fp32", {"fingerprint": "xxh3:one"})


def test_the_same_depth_has_the_same_stages():
    uneven = split_layers(8, Parallelism(pipeline_model_parallel_size=2, decoder_first_pipeline_num_layers=3))
    assert split_beside(uneven, 8, 8) == uneven
    assert [len(chunk) for (chunk,) in split_beside(uneven, 8, 12).chunks] == [6, 6]


def test_other_depths_have_as_many_chunks():
    ours = split_layers(8, Parallelism(pipeline_model_parallel_size=2, num_layers_per_virtual_pipeline_stage=2))
    found = split_beside(ours, 8, 12)
    assert (found.stages, found.virtual_size) == (2, 2) and [len(chunk) for chunk in found.chunks[0]] == [3, 3]
    with pytest.raises(ConfigError, match="does not divide the model's num_layers 6"):
        split_beside(ours, 8, 6)


def test_an_id_means_the_same_to_both(tmp_path):
    same_vocabulary(tmp_path, STUDENT, STUDENT)
    same_vocabulary(tmp_path, dataclasses.replace(STUDENT, tokenizer={}), STUDENT)  # unknown
    with pytest.raises(ConfigError, match="has another tokenizer"):
        same_vocabulary(tmp_path, dataclasses.replace(STUDENT, tokenizer={"fingerprint": "xxh3:two"}), STUDENT)
    with pytest.raises(ConfigError, match="a vocabulary of 101, the model one of 100"):
        larger = dataclasses.replace(ARCH, vocab_size=101)
        same_vocabulary(tmp_path, dataclasses.replace(STUDENT, architecture=larger), STUDENT)


def test_both_cut_the_vocabulary_at_the_same_places(tmp_path):
    classic = dataclasses.replace(STUDENT, ckpt_format="torch")
    same_rows(tmp_path, classic, STUDENT, 1)
    with pytest.raises(ConfigError, match="has 384 rows in its embedding, the model 128"):
        same_rows(tmp_path, dataclasses.replace(classic, padded_vocab_size=384), STUDENT, 1)


def test_preflight_says_what_the_teacher_takes(tmp_path, capsys):
    for name, arch in (("student", ARCH), ("teacher", dataclasses.replace(ARCH, num_layers=8))):
        (tmp_path / name).mkdir()
        for file in ("metadata.json", ".metadata", "common.pt"):
            (tmp_path / name / file).touch()
        write_config(tmp_path / name, dataclasses.replace(STUDENT, architecture=arch, tokenizer={}))
    words = ["--load", "student", "--teacher", "teacher", "--seq_length", "32", "--train_iters", "1", "--data_path"]
    words = [str(tmp_path / word) if word in ("student", "teacher") else word for word in words]
    run_script(preflight.COMMAND, preflight.run, [*words, write(tmp_path / "chats-train", [9, 5])])
    (line,) = [line for line in capsys.readouterr().out.splitlines() if "teacher" in line]
    assert line.startswith("ok:") and "layers 1-8" in line and "GB of weights a process" in line
