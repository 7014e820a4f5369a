"""Words encoded one by one are the text encoded whole; models that would differ are encoded whole."""

import io

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from megatron_ft.data import words
from megatron_ft.data.tokenizer import load_tokenizer
from tests.data.helpers import WORDS, real, sentencepiece_file

PARTS = [
    " ",
    "  ",
    "\n",
    "\n\n",
    "\t",
    "\r\n",
    words.SPACE,
    "\0",
    "fox",
    "the quick",
    "二",
    "😀",
    "é",
    "<s>",
    "<0x0A>",
    "▁a",
    "1",
]


@pytest.fixture(scope="module", params=["made", "llama2"])
def backend(request, tmp_path_factory):
    if request.param == "llama2":
        return load_tokenizer(real("tokenizers/llama2/tokenizer.model"), ["<|im_start|>"]).backend
    return load_tokenizer(sentencepiece_file(tmp_path_factory.mktemp("t")), ["<|im_start|>"]).backend


@settings(max_examples=400, deadline=None)
@given(text=st.one_of(st.lists(st.sampled_from(PARTS), max_size=12).map("".join), st.text()))
def test_word_by_word_is_the_whole(backend, text):
    assert backend._words is not None
    assert backend.encode_batch([text], False)[0].tolist() == backend._model.encode(text)


def test_the_table_stays_small(backend, monkeypatch):
    monkeypatch.setattr(words, "MOST", 5)
    long = "x" * 100
    for text in ("a b c d e f g h", long, f"{long} a"):
        assert backend.encode_batch([text], False)[0].tolist() == backend._model.encode(text)
    assert len(backend._words) <= 5 or long not in backend._words


@pytest.mark.parametrize(
    "options",
    [
        {"model_type": "unigram"},
        {"normalization_rule_name": "nmt_nfkc"},
        {"add_dummy_prefix": False},
        {"remove_extra_whitespaces": True},
        {"user_defined_symbols": ["the quick"]},
        {"user_defined_symbols": ["a\nb"]},
        {"split_by_whitespace": False, "max_sentencepiece_length": 30},
        {"treat_whitespace_as_suffix": True},
    ],
    ids=lambda options: next(iter(options)),
)
def test_models_that_would_differ_are_encoded_whole(tmp_path, options):
    import sentencepiece

    written = io.BytesIO()
    plain = {"model_type": "bpe", "normalization_rule_name": "identity", "remove_extra_whitespaces": False}
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter([WORDS] * 30), model_writer=written, vocab_size=120, hard_vocab_limit=False, minloglevel=2,
        byte_fallback=False, **{**plain, **options},
    )  # fmt: skip
    (tmp_path / "tokenizer.model").write_bytes(written.getvalue())
    backend = load_tokenizer(tmp_path / "tokenizer.model").backend
    assert backend._words is None
    text = "the quick  brown\nfox a\nb "
    assert np.array_equal(backend.encode_batch([text], False)[0], backend._model.encode(text))
