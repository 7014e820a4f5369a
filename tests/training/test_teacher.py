"""Which teachers fit: vocabulary, tokenizer, rows of the embedding, stages; found in config.json alone, before any process starts."""

import dataclasses

import pytest

from megatron_ft.checkpoints.folder import CheckpointConfig, write_config
from megatron_ft.commands import preflight
from megatron_ft.config.cli import run_script
from megatron_ft.config.sections import Parallelism
from megatron_ft.errors import ConfigError
from megatron_ft.models.pipeline import split_beside, split_layers
from megatron_ft.models.quantised import Quantization
from megatron_ft.training.teacher import same_rows, same_vocabulary
from megatron_ft.wording import size as in_words
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


@pytest.mark.parametrize("nf4", [False, True])
def test_preflight_says_what_the_teacher_takes(nf4, tmp_path, capsys):
    """On each of two processes: half of 8 layers, in fp32 or in 4.5 bits, and of the tables in fp32."""
    large = dataclasses.replace(ARCH, num_layers=8, hidden_size=4096, ffn_hidden_size=11264, head_dim=1024)
    quantization = Quantization() if nf4 else None
    for name, arch, kind in (("student", ARCH, None), ("teacher", large, quantization)):
        (tmp_path / name).mkdir()
        for file in ("metadata.json", ".metadata", "common.pt"):
            (tmp_path / name / file).touch()
        write_config(tmp_path / name, dataclasses.replace(STUDENT, architecture=arch, tokenizer={}, quantization=kind))
    words = ["--load", "student", "--teacher", "teacher", "--seq_length", "32", "--train_iters", "1"]
    words = [str(tmp_path / word) if word in ("student", "teacher") else word for word in words]
    words += ["--world_size", "2", "--tensor_model_parallel_size", "2", "--data_path"]
    run_script(preflight.COMMAND, preflight.run, [*words, write(tmp_path / "chats-train", [9, 5])])
    (line,) = [line for line in capsys.readouterr().out.splitlines() if "teacher" in line]
    linears = 8 * (4 * 4096**2 + 3 * 4096 * 11264) / 2
    others = 2 * (256 / 2) * 4096 + 17 * 4096  # 100 tokens are padded to 256 for two processes
    size = linears * (4.5 / 8 if nf4 else 4) + others * 4
    assert line.startswith("ok:") and f"layers 1-8, {in_words(size)} of weights a process" in line
    assert line.endswith(", linears in NF4") == nf4
