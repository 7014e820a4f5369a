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


def byte_level(folder, cut=None, **options):
    """A tokenizer that cuts text by `cut`, or as GPT-2 does; with a token of its own that is looked for in text."""
    import tokenizers
    from tokenizers import decoders, models, pre_tokenizers, trainers

    made = tokenizers.Tokenizer(models.BPE(ignore_merges=cut is not None))
    bytes_only = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=cut is None)
    split = [] if cut is None else [pre_tokenizers.Split(tokenizers.Regex(cut), "isolated")]
    made.pre_tokenizer = pre_tokenizers.Sequence([*split, bytes_only]) if split else bytes_only
    made.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(
        vocab_size=600, special_tokens=["<eos>"], initial_alphabet=alphabet, show_progress=False
    )
    made.train_from_iterator([WORDS, "  the\n\n  fox's  12345 !! 二二"] * 3, trainer)
    made.add_tokens([tokenizers.AddedToken("<own>", special=False, normalized=False)])
    for name, value in options.items():
        setattr(made, name, value)
    made.save(str(folder / "tokenizer.json"))
    return load_tokenizer(folder / "tokenizer.json", ["<|im_start|>"])


@pytest.fixture(scope="module", params=[None, *words.CUTS], ids=["GPT-2", "Llama-3", "Qwen", "GPT-2 written out"])
def bytes_backend(request, tmp_path_factory):
    return byte_level(tmp_path_factory.mktemp("b"), request.param).backend


MORE = [*PARTS, "'s", "'LL", "12345", "½", "\u0301", "\x85", "\x1c", "\u3000", "<own>", "!", "?!", "  \n "]


@settings(max_examples=400, deadline=None)
@given(text=st.one_of(st.lists(st.sampled_from(MORE), max_size=12).map("".join), st.text()))
def test_word_by_word_is_the_whole_at_byte_level(bytes_backend, text):
    assert bytes_backend._words is not None
    (whole,) = bytes_backend._encode([text], True, "encode_batch_fast")
    for at_start in (True, False):
        assert bytes_backend.encode_batch([text], at_start)[0].tolist() == whole.ids


def test_byte_level_tokenizers_that_would_differ_are_encoded_whole(tmp_path):
    from tokenizers import normalizers, pre_tokenizers

    for options in (
        {"pre_tokenizer": pre_tokenizers.ByteLevel(add_prefix_space=True)},
        {"pre_tokenizer": pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)},
        {"pre_tokenizer": pre_tokenizers.Metaspace()},
        {"normalizer": normalizers.Lowercase()},
    ):
        assert byte_level(tmp_path, **options).backend._words is None
    assert byte_level(tmp_path, words.CUTS[0].replace("{1,3}", "{1,2}")).backend._words is None


def test_tokens_that_are_looked_for_in_text_have_room_in_the_vocabulary(tmp_path):
    """As Qwen's <tool_call>: not special, above all words. What is added comes behind them."""
    tokenizer = byte_level(tmp_path)
    own = tokenizer.encode("<own>").tolist()
    assert own == [tokenizer.base_vocab_size] and tokenizer.token_id("<|im_start|>") == own[0] + 1
    assert tokenizer.vocab_size == own[0] + 2 and tokenizer.decode(own) == "<own>"
    assert tokenizer.id_to_token(own[0]) == "<own>"


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
