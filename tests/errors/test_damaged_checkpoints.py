"""Checkpoints cut short, incomplete or of another kind, through each command that reads them; and conversions that cannot be."""

import pytest

from tests.errors.conftest import copy, cut, finetune
from tests.errors.test_before_torch import assert_one_line, renamed_as_iteration


@pytest.fixture
def refused(engine, tmp_path):
    """Exit code 2, one line on stderr with the message, nothing on stdout, nothing written."""

    def run(message, *argv):
        before = sorted(tmp_path.rglob("*"))
        done = engine(*argv)
        assert (done.code, done.out) == (2, ""), done
        assert_one_line(done.err, argv[0], message)
        assert sorted(tmp_path.rglob("*")) == before

    return run


def readers(shop, checkpoint, target) -> dict[str, list]:
    """Every command that reads a checkpoint's weights."""
    return {
        "finetune": finetune(shop, checkpoint, save=target),
        "generate": ["generate", "--load", checkpoint, "--prompt", "plum", "--max_new_tokens", 2],
        "megatron-to-hf": ["megatron-to-hf", checkpoint, target],
    }


DAMAGE = [
    ("classic", "mp_rank_00/model_optim_rng.pt", 0.5),
    ("classic", "mp_rank_00/model_optim_rng.pt", 0),
    ("dist", "__0_0.distcp", 0.5),
    ("dist", "__0_0.distcp", 0),
    ("dist", "__0_0.distcp", None),
    ("dist", ".metadata", 0.5),
    ("dist", ".metadata", None),
    ("dist", "common.pt", 0.5),
]


@pytest.mark.parametrize(
    "command, kind, name, keep",
    [
        (command, *damage)
        for command in ("finetune", "generate", "megatron-to-hf")
        for damage in DAMAGE
        if (command, damage[1]) != ("megatron-to-hf", "common.pt")  # an export needs the tensors only
    ],
)
def test_weights(refused, shop, tmp_path, command, kind, name, keep):
    broken = copy(getattr(shop, kind), tmp_path / "broken")
    path = next((broken / "release").glob(name))
    path.unlink() if keep is None else cut(path, keep)
    refused(r"broken/release.*(missing|cut short|damaged)", *readers(shop, broken, tmp_path / "target")[command])


@pytest.mark.parametrize("name", ["__0_0.distcp", "common.pt", ".metadata"])
def test_training_state(refused, shop, tmp_path, name):
    broken = copy(shop.trained, tmp_path / "broken")
    cut(broken / "iter_0000002" / name)
    refused(r"broken/iter_0000002.*cut short; restore it, or use an earlier one", *finetune(shop, broken, iters=4))


def test_weights_alone_cannot_be_resumed(refused, shop, tmp_path):
    weights = renamed_as_iteration(shop.dist, tmp_path / "weights")
    message = r"iter_0000005: holds weights only, no training state to resume: .*--finetune"
    refused(message, *finetune(shop, weights, iters=9))


@pytest.mark.parametrize(
    "words, message",
    [
        (["--tensor_model_parallel_size", 3], "--tensor_model_parallel_size 3 does not divide the model's num_attention_heads 4"),
        (["--pipeline_model_parallel_size", 3], "--pipeline_model_parallel_size 3 does not divide the model's num_layers 4; .* 1, 2, 4"),
        (["--chat_format", "chatl"], "unknown chat format 'chatl': choose one of chatml"),
        (["--tokenizer", "/nowhere.model"], "/nowhere.model: no such tokenizer"),
        (["--vocab_extra_ids_list", "a,a"], "a token occurs twice"),
        (["--make_vocab_size_divisible_by", 0], "must be at least 1"),
    ],
)  # fmt: skip
def test_conversion(refused, shop, tmp_path, words, message):
    refused(message, "hf-to-megatron", shop.hf, tmp_path / "target", *words)


def test_conversion_of_what_is_not_there(refused, shop, tmp_path):
    refused("nowhere", "hf-to-megatron", tmp_path / "nowhere", tmp_path / "target")
    refused("nowhere: no such folder", "megatron-to-hf", tmp_path / "nowhere", tmp_path / "target")
    words = [shop.dist, tmp_path / "target", "--iteration", 9]
    refused("iter_0000009 does not exist; .* holds: release", "megatron-to-hf", *words)
    refused("exists and is not empty", "hf-to-megatron", shop.hf, shop.dist)


def test_prompt_longer_than_the_model(refused, shop):
    words = ["--load", shop.dist, "--prompt", "plum " * 200]
    refused(r"prompt 0 has \d+ tokens; the model accepts 1 to 127: shorten it", "generate", *words)


def test_conversation_that_the_format_cannot_say(refused, shop, tmp_path):
    prompts = tmp_path / "prompts.jsonl"
    prompts.write_text('{"messages": [{"role": "cat", "content": "meow"}]}\n')
    words = ["--load", shop.dist, "--prompts", prompts, "--output", tmp_path / "answers.jsonl"]
    refused("unknown role 'cat': chat format chatml knows", "generate", *words)


def test_export_that_is_incomplete(refused, shop, engine, tmp_path):
    export = tmp_path / "export"
    assert engine("megatron-to-hf", shop.dist, export).code == 0
    cut(export / "model.safetensors")
    refused(
        "export.*model.safetensors has .* were written: it is cut short",
        "generate",
        "--load",
        export,
        "--prompt",
        "plum",
    )
    (export / "model.safetensors").unlink()
    refused("export.*safetensors", "generate", "--load", export, "--prompt", "plum")
