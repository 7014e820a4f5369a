"""A tokenizer's own chat template all the way: pretokenized with, trained with, spoken with, exported."""

import json

import numpy as np
import pytest

from megatron_ft.data.chat_template import own_template
from megatron_ft.data.shards import open_shards
from megatron_ft.data.tokenizer import load_tokenizer
from tests.errors.conftest import Desk, train_tokenizer, write_chats

TEMPLATE = "{% for m in messages %}<s>{{ m.role }} {{ m.content }}</s>{% endfor %}{% if add_generation_prompt %}<s>assistant {% endif %}"

CHAT = [{"role": "user", "content": "plum fox"}, {"role": "assistant", "content": "a bird"}]


def record(path: str) -> None:
    """In the command's process: write down what the model is asked."""
    from megatron_ft.generation.loading import ChatModel

    made = ChatModel.prompt_ids

    def prompt_ids(self, messages):
        ids = made(self, messages)
        with open(path, "w") as file:
            json.dump(np.asarray(ids).tolist(), file)
        return ids

    ChatModel.prompt_ids = prompt_ids


@pytest.fixture(scope="module")
def engine():
    desk = Desk("engine")
    yield desk
    desk.close()


def test_trained_with_and_spoken_with(engine, tmp_path):
    def must(*words, **request):
        done = engine(*words, **request)
        assert done.code == 0, done.err
        return done

    tokenizer = train_tokenizer(tmp_path / "tokenizer", 300)
    hf = tmp_path / "hf"
    small = ("--hidden_size", 64, "--max_position_embeddings", 128)
    must(tokenizer, hf, *small, module="examples.oasst.make_tiny_llama")
    (hf / "chat_template.jinja").write_text(TEMPLATE)
    must("hf-to-megatron", hf, tmp_path / "start")
    chats = write_chats(tmp_path / "chats.jsonl", 20)
    words = ("--input", chats, "--tokenizer", hf, "--chat_format", "tokenizer", "--output_prefix", tmp_path / "data/x")
    must("pretokenize", *words)
    assert "name" not in open_shards(tmp_path / "data/x-train").manifest.chat_format
    must(
        *("finetune", "--load", tmp_path / "start", "--data_path", tmp_path / "data/x-train", "--seq_length", 64),
        *("--train_iters", 1, "--global_batch_size", 2, "--save", tmp_path / "tuned"),
    )
    must("megatron-to-hf", tmp_path / "tuned", tmp_path / "exported")
    exported = (tmp_path / "exported/chat_template.jinja").read_text().rstrip("\n")
    assert exported.count("{% generation %}") == 1
    assert own_template(load_tokenizer(tmp_path / "exported")).text(CHAT) == own_template(load_tokenizer(hf)).text(CHAT)
    model = load_tokenizer(hf)
    start, end = model.token_id("<s>"), model.token_id("</s>")
    asked = [start, *model.encode("user plum fox"), end, start, *model.encode("assistant ")]
    plain = model.encode("plum fox").tolist()
    (tmp_path / "prompts.jsonl").write_text(json.dumps({"prompt": "plum fox"}))
    for folder, more, expected in (
        ("tuned", (), asked),
        ("exported", (), asked),
        ("tuned", ("--chat_format", "tokenizer"), asked),
    ):
        request = {"hook": f"{__name__}:record", "hook_args": [str(tmp_path / "asked.json")]}
        words = ("--load", tmp_path / folder, "--prompts", tmp_path / "prompts.jsonl", "--max_new_tokens", 2, *more)
        must("generate", *words, **request)
        assert json.loads((tmp_path / "asked.json").read_text()) == expected != plain
