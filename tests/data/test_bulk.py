"""gigatoken gives the reference libraries' ids, or the reference library is used."""

import io
import json
import sys
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from benchmarks import texts
from megatron_ft.data import bulk
from megatron_ft.data.sentencepiece_model import SentencePieceModel
from megatron_ft.data.tokenizer import load_tokenizer
from megatron_ft.data.tokenizer_spaces import with_rule
from megatron_ft.errors import TokenizerError
from tests.data.helpers import WORDS, real, sentencepiece_bytes, sentencepiece_file

GPT_4 = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
CUTS = {"GPT-2": None, "Llama-3": GPT_4, "Qwen": GPT_4.replace("{1,3}", "")}
PARTS = [
    *(" ", "  ", "\n", "\n\n", "\t", "\r\n", "  \n ", "\u2581", "\0", "\x85", "\x1c", "\u3000", "\u200d", "\ufeff"),
    *("fox", "the quick", "二", "😀", "é", "e\u0301", "\u0301", "İ", "ǅ", "한국", "ก็", "1", "12345", "½", "'s", "'LL", "!", "?!"),
    *("<s>", "<0x0A>", "▁a", "<own>", "<own", "<eos>", "<|im_start|>", "a\nb"),
]  # fmt: skip
ANY_TEXT = st.one_of(st.lists(st.sampled_from(PARTS), max_size=12).map("".join), st.text())


def byte_level(folder, cut=None, dropout=None, **options):
    """A tokenizer that cuts text by `cut`, or as GPT-2 does; with a token of its own that is looked for in text."""
    import tokenizers
    from tokenizers import decoders, models, pre_tokenizers, trainers

    made = tokenizers.Tokenizer(models.BPE(ignore_merges=cut is not None, dropout=dropout))
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


def trained(folder, **options):
    """A SentencePiece model of the kind."""
    import sentencepiece

    plain = {"model_type": "bpe", "normalization_rule_name": "identity", "remove_extra_whitespaces": False}
    written = io.BytesIO()
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter([WORDS, "  12 the quick\nbrown <own>"] * 30), model_writer=written,
        hard_vocab_limit=False, minloglevel=2, **{**plain, "vocab_size": 380, "byte_fallback": True, **options},
    )  # fmt: skip
    (folder / "tokenizer.model").write_bytes(written.getvalue())
    return load_tokenizer(folder / "tokenizer.model", ["<|im_start|>"])


def spaced_first(folder):
    """A tokenizer.json that adds a space to the first text only, as transformers' class for Llama says."""
    model = SentencePieceModel(sentencepiece_file(folder))
    (folder / "tokenizer.json").write_text(json.dumps(with_rule(model.as_json(), "first")))
    return load_tokenizer(folder / "tokenizer.json", ["<|im_start|>"])


KINDS = {
    **{name: lambda folder, cut=cut: byte_level(folder, cut) for name, cut in CUTS.items()},
    "NFC": lambda folder: byte_level(folder, GPT_4, normalizer=_nfc()),
    "a space before the text": lambda folder: byte_level(folder, pre_tokenizer=_spaced()),
    "first word": lambda folder: spaced_first(folder),
    "SentencePiece": trained,
    "no added space": lambda folder: trained(folder, add_dummy_prefix=False),
    "over spaces": lambda folder: trained(folder, split_by_whitespace=False, max_sentencepiece_length=30),
    "control": lambda folder: trained(folder, control_symbols=["<own>"]),
    "looked for": lambda folder: trained(
        folder, user_defined_symbols=["a\nb", "<own>", "the quick"], add_dummy_prefix=False
    ),
    "Llama-2": lambda folder: load_tokenizer(real("tokenizers/llama2/tokenizer.model"), ["<|im_start|>"]),
}


def _nfc():
    from tokenizers import normalizers

    return normalizers.NFC()


def _spaced():
    from tokenizers import pre_tokenizers

    return pre_tokenizers.ByteLevel(add_prefix_space=True)


@pytest.fixture(scope="module", params=KINDS)
def both(request, tmp_path_factory):
    """A tokenizer with the reference library, and the same with gigatoken."""
    slow, fast = (KINDS[request.param](tmp_path_factory.mktemp("t")) for _ in range(2))
    assert fast.hasten()
    return slow, fast


@settings(max_examples=300, deadline=None)
@given(text=ANY_TEXT)
def test_ids_are_those_of_the_reference_library(both, text):
    slow, fast = both
    for at_start in (True, False):
        assert fast.encode(text, at_start).tolist() == slow.encode(text, at_start).tolist()


def _same(slow, fast, size, places=None):
    some, so_far = [], 0
    for pair in texts.pairs(places):
        some += pair
        so_far += len(pair[1].encode())
        if so_far >= size:
            break
    assert so_far >= size
    for first in range(0, len(some), 1000):
        found, expected = (one.encode_batch(some[first : first + 1000], False) for one in (fast, slow))
        assert all(map(np.array_equal, found, expected))


@pytest.mark.parametrize("size", [10**6, pytest.param(10**8, marks=pytest.mark.thorough)])
@pytest.mark.parametrize("kind", ["SentencePiece", "Llama-2", "Llama-3"])
def test_ids_of_the_sources_of_packages(kind, size, tmp_path):
    slow, fast = (KINDS[kind](tmp_path) for _ in range(2))
    assert fast.hasten()
    _same(slow, fast, size)


@pytest.mark.parametrize(
    "make",
    [
        lambda folder: byte_level(folder, pre_tokenizer=_uncut()),
        lambda folder: byte_level(folder, GPT_4.replace("{1,3}", "{1,2}")),
        lambda folder: byte_level(folder, dropout=0.5),
        lambda folder: trained(folder, model_type="unigram"),
        lambda folder: trained(folder, normalization_rule_name="nmt_nfkc"),
        lambda folder: trained(folder, byte_fallback=False, vocab_size=120),
        lambda folder: trained(folder, remove_extra_whitespaces=True),
        lambda folder: trained(folder, user_defined_symbols=["the quick"]),
        lambda folder: trained(folder, treat_whitespace_as_suffix=True),
    ],
)
def test_what_gigatoken_does_otherwise_is_left_to_the_reference_library(make, tmp_path):
    tokenizer = make(tmp_path)
    assert not tokenizer.hasten(["the quick"])
    assert tokenizer.decode(tokenizer.encode("the quick")).strip() == "the quick"


def _uncut():
    from tokenizers import pre_tokenizers

    return pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)


def test_without_gigatoken_the_reference_library_is_used(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "gigatoken.gigatoken_rs", None)
    tokenizer = load_tokenizer(sentencepiece_file(tmp_path))
    assert not tokenizer.hasten(["a b"]) and len(tokenizer.encode("a b"))


class _Panic(BaseException):
    """As Rust's, which is no Exception."""


_Panic.__name__ = "PanicException"


class Encoder:
    """gigatoken with a fault."""

    def __init__(self, description, fault):
        self._true, self._fault = LOAD(description), fault

    def encode(self, text):
        return self._fault(text, self._true.encode(text))


LOAD = bulk._load


@pytest.mark.parametrize("fault", [ValueError("no"), _Panic("index out of bounds")])
@pytest.mark.parametrize("kind", ["SentencePiece", "first word"])
def test_a_text_on_which_it_stops_is_encoded_by_the_reference_library(fault, kind, tmp_path, monkeypatch):
    def stop(text, ids):
        if "stop" in text:
            raise fault
        return ids

    monkeypatch.setattr(bulk, "_load", lambda description: Encoder(description, stop))
    tokenizer, slow = KINDS[kind](tmp_path), KINDS[kind](tmp_path)
    assert tokenizer.hasten()
    found = tokenizer.encode_batch(["the fox", "stop here", "a dog"], False)
    assert [ids.tolist() for ids in found] == [
        ids.tolist() for ids in slow.encode_batch(["the fox", "stop here", "a dog"], False)
    ]


@pytest.mark.parametrize("kind", ["SentencePiece", "first word"])
def test_other_ids_in_the_first_texts_of_a_run_are_noticed(kind, tmp_path, monkeypatch, caplog):
    monkeypatch.setattr(
        bulk, "_load", lambda description: Encoder(description, lambda text, ids: ids[1:] if "zebra" in text else ids)
    )
    tokenizer = KINDS[kind](tmp_path)
    assert not tokenizer.hasten(["a zebra"])
    assert "other ids for 'a zebra'; the slower reference library is used" in caplog.text
    assert tokenizer.decode(tokenizer.encode("a zebra")).strip() == "a zebra"
    assert tokenizer.hasten(["a fox"])  # nothing was wrong with it


@pytest.mark.parametrize("kind", ["SentencePiece", "GPT-2"])
def test_it_is_made_anew_before_it_remembers_too_much(kind, tmp_path, monkeypatch):
    made = []
    monkeypatch.setattr(bulk, "_load", lambda description: made.append(1) or LOAD(description))
    slow, fast = (KINDS[kind](tmp_path) for _ in range(2))
    assert fast.hasten()
    before = len(made)
    monkeypatch.setattr(bulk, "RENEW", 1000)
    some = [f"number {i} of them" for i in range(500)]
    for text in some:
        assert fast.encode(text, False).tolist() == slow.encode(text, False).tolist()
    assert sum(map(len, some)) // 1000 <= len(made) - before <= sum(map(len, some)) // 1000 + 1


@pytest.mark.parametrize("kind", ["SentencePiece", "GPT-2"])
def test_half_a_character_is_refused(kind, tmp_path):
    tokenizer = KINDS[kind](tmp_path)
    assert tokenizer.hasten()
    with pytest.raises(TokenizerError, match="lone surrogate"):
        tokenizer.encode("a\ud800b")


def test_a_token_that_is_reserved_later_is_no_text_any_more(tmp_path):
    (tmp_path / "tokenizer.model").write_bytes(sentencepiece_bytes(user_defined=("<own>",)))
    assert not load_tokenizer(tmp_path / "tokenizer.model").hasten()
    tokenizer = load_tokenizer(tmp_path / "tokenizer.model", ["<own>"])
    assert tokenizer.hasten()
    assert tokenizer.token_id("<own>") not in tokenizer.encode("an <own> goal")


def test_tokens_that_are_looked_for_in_text_have_room_in_the_vocabulary(tmp_path):
    """As Qwen's <tool_call>: not special, above all words. What is added comes behind them."""
    tokenizer = byte_level(tmp_path)
    for _ in range(2):
        own = tokenizer.encode("<own>").tolist()
        assert own == [tokenizer.base_vocab_size] and tokenizer.token_id("<|im_start|>") == own[0] + 1
        assert tokenizer.vocab_size == own[0] + 2 and tokenizer.decode(own) == "<own>"
        assert tokenizer.id_to_token(own[0]) == "<own>"
        assert tokenizer.hasten()


def test_text_that_does_not_repeat(tmp_path):
    """What the benchmarks take."""
    size, found = texts.write(tmp_path / "chats.jsonl", 300_000)
    assert size >= 300_000 and len(set(found[1::2])) == len(found) // 2
    assert len(Path(tmp_path / "chats.jsonl").read_text().splitlines()) == len(found) // 2
