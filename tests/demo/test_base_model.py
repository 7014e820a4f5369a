"""The model the demo starts from is a Hugging Face model like any other."""

import pytest

from megatron_ft.demo.base_model import Shape, write_base_model
from megatron_ft.demo.chats import make_chats

SHAPE = Shape(vocab_size=400, hidden_size=32, intermediate_size=64, num_hidden_layers=2, num_attention_heads=4)


@pytest.fixture(scope="module")
def texts() -> list[str]:
    return [turn["content"] for chat in make_chats(1, 200).chats for turn in chat["messages"]]


@pytest.fixture(scope="module")
def folder(tmp_path_factory, texts):
    path = tmp_path_factory.mktemp("base") / "hf"
    write_base_model(path, texts, seed=5, shape=SHAPE)
    return path


def test_transformers_loads_every_weight(folder):
    from transformers import AutoModelForCausalLM

    model, info = AutoModelForCausalLM.from_pretrained(folder, output_loading_info=True)
    assert not info["missing_keys"] and not info["unexpected_keys"] and not info["mismatched_keys"]
    assert model.config.num_key_value_heads == 2 and model.config.vocab_size == 400
    assert 0.03 < float(model.lm_head.weight.detach().std()) < 0.05


def test_both_tokenizers_read_it_and_any_text_survives(folder):
    from transformers import AutoTokenizer

    from megatron_ft.data.tokenizer import load_tokenizer

    ours, theirs = load_tokenizer(folder), AutoTokenizer.from_pretrained(folder)
    for text in ("What colour is a plum?", "naïve 東京 🦊\n  two  spaces"):
        assert ours.decode(ours.encode(text)) == text
    plain = "What colour is a plum?"
    assert ours.encode(plain).tolist() == theirs(plain, add_special_tokens=False)["input_ids"]


def test_same_seed_same_bytes(folder, tmp_path, texts):
    write_base_model(tmp_path / "again", texts, seed=5, shape=SHAPE)
    write_base_model(tmp_path / "other", texts, seed=6, shape=SHAPE)
    for name in ("tokenizer.model", "config.json", "model.safetensors"):
        assert (tmp_path / "again" / name).read_bytes() == (folder / name).read_bytes()
    assert (tmp_path / "other/model.safetensors").read_bytes() != (folder / "model.safetensors").read_bytes()
