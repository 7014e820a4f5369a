"""`inspect` and `preflight` on small shards: what is shown, and that every finding names its flag."""

import re

import numpy as np
import pytest

from megatron_ft.checkpoints.folder import CheckpointConfig, write_config
from megatron_ft.commands import inspect, preflight
from megatron_ft.config.cli import run_script
from megatron_ft.data.shards import ShardWriter, open_shards
from megatron_ft.data.tokenizer import load_tokenizer
from megatron_ft.models.architecture import Architecture
from tests.data.helpers import CONTROLS
from tests.pretokenizer.test_pretokenize import place, shortcut  # noqa: F401 - a fixture


@pytest.fixture
def shards(place):  # noqa: F811
    assert shortcut("--val_split", 0, "--marked_prompts", 1) == 0
    return place


def look(*flags):
    return run_script(inspect.COMMAND, inspect.run, [str(flag) for flag in flags])


def test_samples_in_the_terminal(shards, capsys):
    capsys.readouterr()
    assert look("out/mine-train", "--sample", 2, "--marked_loss_weight", 0, "--seq_length", 64) == 0
    said = capsys.readouterr().out
    assert "10 samples" in said and "<|im_end|>" in said
    assert "«<|im_start|>assistant\n" in said
    assert re.search(r"positions +0 to +\d+: sample \d", said)
    assert look("out/mine-train", "--tokens", "--count", 1) == 0
    said = capsys.readouterr().out
    assert re.search(r"\d+ +user +1.00 .*marked", said)
    assert look("out/mine-train", "--sample", 10) == 2
    assert "samples 0 to 9" in capsys.readouterr().err


def test_a_page(shards, capsys):
    assert look("out/mine-train", "--html", "x.html", "--seq_length", 32) == 0
    page = (shards / "x.html").read_text()
    assert 'class="t assistant on' in page and "&lt;|im_end|&gt;" in page and 'title="id ' in page
    assert "http" not in page


def test_without_or_with_another_tokenizer(shards, capsys):
    (shards / "tokenizer.model").rename(shards / "moved.model")
    assert look("out/mine-train") == 0
    assert "only token ids are shown" in capsys.readouterr().err
    assert look("out/mine-train", "--tokenizer", "moved.model") == 0
    assert "assistant" in capsys.readouterr().out


def checkpoint(place, vocab_size, tokenizer, **more):  # noqa: F811
    sizes = {"num_layers": 4, "hidden_size": 32, "ffn_hidden_size": 64, "num_attention_heads": 4, "num_query_groups": 2}
    arch = Architecture(
        "llama", **sizes, head_dim=8, vocab_size=vocab_size, max_position_embeddings=128, norm_epsilon=1e-5
    )
    folder = place / "model/release"
    folder.mkdir(parents=True, exist_ok=True)
    (folder.parent / "latest_checkpointed_iteration.txt").write_text("release")
    for name in ("metadata.json", ".metadata", "common.pt"):
        (folder / name).touch()
    write_config(folder, CheckpointConfig(arch, "torch_dist", 1, 1, vocab_size, "release", "fp32", tokenizer, **more))


def fly(*flags):
    base = ("--load", "model", "--data_path", "out/mine-train", "--train_iters", 10, "--save", "runs/x")
    return run_script(preflight.COMMAND, preflight.run, [str(flag) for flag in (*base, *flags)])


def test_a_good_command_line(shards, capsys):
    tokenizer = load_tokenizer("tokenizer.model", CONTROLS)
    checkpoint(shards, tokenizer.vocab_size, tokenizer.info(), chat_format="chatml")
    assert fly("--seq_length", 128) == 0, capsys.readouterr()
    said = capsys.readouterr().out
    assert "0 errors" in said and "every sample has tokens that are trained on" in said
    assert not (shards / "runs").exists()


@pytest.mark.parametrize(
    ("flags", "messages"),
    [
        (("--seq_length", 256), ["--seq_length 256 is beyond the model's 128 positions"]),
        (("--tensor_model_parallel_size", 3, "--world_size", 3), ["does not divide the model's num_attention_heads 4"]),
        (("--pipeline_model_parallel_size", 3, "--world_size", 3), ["does not divide the model's num_layers 4"]),
        (("--tensor_model_parallel_size", 2), ["1 process cannot hold tensor_model_parallel_size 2"]),
        (("--seq_length", 4), ["lose all tokens that are trained on", "increase --seq_length", "are cut"]),
        (("--load", "nothing"), ["(--load)"]),
        (("--data_path", "nothing"), ["(--data_path)"]),
        (("--train_iters", 100_000), ["epochs", "check --train_iters"]),
    ],
)  # fmt: skip
def test_findings_name_the_flag(shards, capsys, flags, messages):
    assert shortcut("--val_split", 0, "--overwrite") == 0
    tokenizer = load_tokenizer("tokenizer.model", CONTROLS)
    checkpoint(shards, tokenizer.vocab_size, tokenizer.info())
    assert fly("--seq_length", 128, *flags) == (0 if "check --train_iters" in messages else 2)
    said = capsys.readouterr().out
    for message in messages:
        assert message in said


def test_another_vocabulary_another_format_and_a_full_disk(shards, capsys, monkeypatch):
    import collections
    import shutil

    tokenizer = load_tokenizer("tokenizer.model", CONTROLS)
    checkpoint(shards, 100, tokenizer.info(), chat_format="alfred")
    assert fly("--seq_length", 128) == 2
    assert "the model's has 100" in capsys.readouterr().out
    checkpoint(shards, tokenizer.vocab_size, tokenizer.info(), chat_format="alfred")
    monkeypatch.setattr(shutil, "disk_usage", lambda _: collections.namedtuple("Usage", "free")(10))
    assert fly("--seq_length", 128) == 2
    said = capsys.readouterr().out
    assert "chat format chatml, the checkpoint's is alfred" in said
    assert "not one fits; set --save to a folder on another disk" in said


def test_samples_that_teach_nothing(place, capsys):  # noqa: F811
    tokenizer = load_tokenizer("tokenizer.model", CONTROLS)
    described = {"name": "chatml", "stop_token": "<|im_end|>"}
    with ShardWriter("x-train", tokenizer.vocab_size, tokenizer.info(), described, [1.0, 0.0]) as writer:
        writer.add(np.arange(3, 9), np.ones(6, int))
        writer.add(np.array([5, tokenizer.token_id("<|im_end|>")]), np.array([1, 0b10010]))
        writer.add(np.array([5, 6, 7]), np.array([1, 2, 2]))
    checkpoint(place, tokenizer.vocab_size, tokenizer.info())
    assert fly("--data_path", "x-train", "--seq_length", 128) == 0
    said = capsys.readouterr().out
    assert "2 of 3 samples have no token that is trained on" in said
    assert "no answer ends" in said and "has loss weight 0" in said
    assert len(open_shards("x-train")) == 3
