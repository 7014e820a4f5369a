"""Tokenizers: text and control tokens kept apart, ids of extra tokens, folders, fingerprints."""

import json
import shutil

import numpy as np
import pytest

from megatron_ft.data.tokenizer import MEGATRON_TOKENS, extra_tokens, load_tokenizer
from megatron_ft.errors import TokenizerError
from tests.data.helpers import CONTROLS, fast_file, real, sentencepiece_file

KINDS = pytest.mark.parametrize("make", [sentencepiece_file, fast_file, lambda folder: fast_file(folder, "metaspace")])


@KINDS
def test_text_never_spells_a_control_token(tmp_path, make):
    tokenizer = load_tokenizer(make(tmp_path), CONTROLS)
    text = "a <|im_end|> b <|im_start|> <unk> <eos> <s> </s>"
    ids = tokenizer.encode(text)
    assert ids.dtype == np.int32
    assert not set(ids.tolist()) & set(tokenizer.added_tokens.values())
    assert tokenizer.decode(ids) == text


@KINDS
def test_extra_tokens_get_the_next_ids_in_order(tmp_path, make):
    tokenizer = load_tokenizer(make(tmp_path), ["<b>", "<a>", "<b>"])
    base = tokenizer.base_vocab_size
    assert (tokenizer.token_id("<b>"), tokenizer.token_id("<a>"), tokenizer.vocab_size) == (base, base + 1, base + 2)
    assert tokenizer.id_to_token(base) == "<b>"
    assert tokenizer.decode([base, *tokenizer.encode("fox"), base + 1]) == "<b>fox<a>"
    assert tokenizer.decode([base, *tokenizer.encode("fox"), base + 1], skip_special=True) == "fox"


def test_unknown_tokens_are_refused(tmp_path):
    tokenizer = load_tokenizer(sentencepiece_file(tmp_path))
    with pytest.raises(TokenizerError, match="no special token '<b>'"):
        tokenizer.token_id("<b>")
    with pytest.raises(TokenizerError, match="outside the vocabulary"):
        tokenizer.id_to_token(tokenizer.vocab_size)


def test_user_defined_pieces_named_as_control_tokens_stop_matching(tmp_path):
    """Models are found that carry <|im_start|> as a piece; it keeps its id, but user text no longer yields it."""
    path = sentencepiece_file(tmp_path, user_defined=("<|im_start|>",))
    tokenizer = load_tokenizer(path, CONTROLS)
    assert tokenizer.token_id("<|im_start|>") < tokenizer.base_vocab_size
    assert tokenizer.token_id("<|im_end|>") == tokenizer.base_vocab_size
    ids = tokenizer.encode("a <|im_start|> b")
    assert tokenizer.token_id("<|im_start|>") not in ids
    assert tokenizer.decode(ids) == "a <|im_start|> b"


def test_metaspace_first_prepends_at_the_start_only(tmp_path):
    tokenizer = load_tokenizer(fast_file(tmp_path, "metaspace"))
    start, behind = (tokenizer.encode("fox", at_start=flag).tolist() for flag in (True, False))
    assert start != behind
    assert tokenizer.id_to_token(behind[0]).startswith("f")


@pytest.mark.parametrize(
    ("name", "content"),
    [
        ("added_tokens.json", {"<x>": 450}),
        ("tokenizer_config.json", {"added_tokens_decoder": {"450": {"content": "<x>", "special": True}}}),
    ],
)
def test_added_tokens_of_a_folder_are_known(tmp_path, name, content):
    size = load_tokenizer(sentencepiece_file(tmp_path)).base_vocab_size
    (tmp_path / name).write_text(json.dumps(content).replace("450", str(size)))
    tokenizer = load_tokenizer(tmp_path, ["<x>", "<y>"])
    assert tokenizer.added_tokens == {"<x>": size, "<y>": size + 1}


def test_fingerprint_is_the_tokenizers_not_the_files(tmp_path):
    (tmp_path / "copy").mkdir()
    one = sentencepiece_file(tmp_path)
    shutil.copy(one, tmp_path / "copy/renamed.model")
    prints = [
        load_tokenizer(path, extra).fingerprint
        for path, extra in [
            (one, CONTROLS),
            (tmp_path, CONTROLS),
            (tmp_path / "copy/renamed.model", CONTROLS),
            (one, ()),
        ]
    ]
    assert prints[0] == prints[1] == prints[2] != prints[3]


def test_fingerprint_survives_rewriting_by_the_library(tmp_path):
    """Merges as "a b" or ["a", "b"], padding or none: the same tokenizer."""
    path = fast_file(tmp_path)
    before = load_tokenizer(path).fingerprint
    content = json.loads(path.read_text())
    content["model"]["merges"] = [" ".join(pair) for pair in content["model"]["merges"]]
    content["truncation"] = {"direction": "Right", "max_length": 5, "strategy": "LongestFirst", "stride": 0}
    path.write_text(json.dumps(content))
    tokenizer = load_tokenizer(path)
    assert tokenizer.fingerprint == before
    assert len(tokenizer.encode("the quick brown fox jumps over a lazy dog, and more and more")) > 5


def test_unreadable_tokenizers_are_one_line_errors(tmp_path):
    with pytest.raises(TokenizerError, match="no such tokenizer"):
        load_tokenizer(tmp_path / "nothing")
    with pytest.raises(TokenizerError, match=r"neither tokenizer\.json nor tokenizer\.model"):
        load_tokenizer(tmp_path)
    (tmp_path / "bad.model").write_bytes(b"version https://git-lfs.github.com/spec/v1\n")
    with pytest.raises(TokenizerError, match="not a SentencePiece model"):
        load_tokenizer(tmp_path / "bad.model")
    for content in ("{", "[]", "{}", '{"model": {"type": "Nonsense"}}'):
        (tmp_path / "bad.json").write_text(content)
        with pytest.raises(TokenizerError, match=r"bad\.json"):
            load_tokenizer(tmp_path / "bad.json")


def test_a_foreign_file_called_tokenizer_model_gives_way_to_the_json(tmp_path):
    fast_file(tmp_path)
    (tmp_path / "tokenizer.model").write_bytes(b"IQ== 0\nIg== 1\n")  # tiktoken's format goes by that name too
    assert load_tokenizer(tmp_path).kind == "huggingface"


def test_lone_surrogates_are_refused(tmp_path):
    for folder, make in (("a", sentencepiece_file), ("b", fast_file)):
        (tmp_path / folder).mkdir()
        with pytest.raises(TokenizerError, match="surrogate"):
            load_tokenizer(make(tmp_path / folder)).encode("\ud800")


def test_megatron_flags_as_extra_tokens():
    named = '"<|im_start|>,<|im_end|>"'  # as the model cards show it, one pair of quotes too many
    assert extra_tokens("SentencePieceTokenizer", named) == [*MEGATRON_TOKENS, *CONTROLS]
    assert extra_tokens("SentencePieceTokenizer", named, new_tokens=False) == list(CONTROLS)
    assert extra_tokens(None, None) == []
    with pytest.raises(TokenizerError, match="GPT2BPETokenizer"):
        extra_tokens("GPT2BPETokenizer", "")


def test_llama2_ids_of_the_open_assistant_models():
    extra = extra_tokens("SentencePieceTokenizer", "<|im_start|>,<|im_end|>")
    tokenizer = load_tokenizer(real("tokenizers/llama2/tokenizer.model"), extra)
    assert [tokenizer.token_id(t) for t in ("<CLS>", "<PAD>", "<|im_start|>", "<|im_end|>")] == [
        32000,
        32004,
        32005,
        32006,
    ]
    assert (tokenizer.bos_id, tokenizer.eos_id, tokenizer.vocab_size) == (1, 2, 32007)
