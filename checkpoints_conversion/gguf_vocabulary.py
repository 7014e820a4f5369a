"""The tokenizer of a GGUF file, from the tokenizer.json and tokenizer_config.json of an export.

Two kinds: "llama" is SentencePiece's BPE, with a score for each piece; "gpt2" is byte-level BPE, with merges and the name of a rule that
cuts words, which llama.cpp has built in.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING, Any

from megatron_ft.data.sentencepiece_export import BPE
from megatron_ft.data.sentencepiece_model import SentencePieceModel
from megatron_ft.data.tokenizer import Tokenizer
from megatron_ft.errors import ConfigError
from megatron_ft.files import read_json
from megatron_ft.log import logger

if TYPE_CHECKING:
    from gguf import GGUFWriter

NORMAL, UNKNOWN, CONTROL, USER_DEFINED, UNUSED, BYTE = range(1, 7)
"""Kinds of tokens, as in gguf.TokenType and in SentencePiece."""
_LLAMA3 = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
_BYTES = ("ByteLevel", True)
"""Cuts words as GPT-2 does."""
_CUTS: dict[tuple, str] = {
    (_BYTES,): "gpt-2",
    (("Digits", True), _BYTES): "starcoder",
    (("Split", _LLAMA3), ("ByteLevel", False)): "llama-bpe",
    (("Split", _LLAMA3.replace("{1,3}", "")), ("ByteLevel", False)): "qwen2",
    (("Punctuation", "Contiguous"), _BYTES, ("Digits", False), ("Split", "[0-9][0-9][0-9]")): "falcon",
}
"""Steps that cut words -> llama.cpp's name for them."""
_TOLD = {"ByteLevel": "use_regex", "Digits": "individual_digits", "Punctuation": "behavior"}

Token = tuple[str, float, int]
"""Text, score and kind."""


def add_vocabulary(writer: GGUFWriter, tokenizer: Tokenizer | None, folder: Path, vocab_size: int) -> None:
    """Write tokens, special tokens and chat template. folder: of the exported tokenizer. Raise ConfigError for one that llama.cpp lacks."""
    from gguf import SpecialVocab

    if tokenizer is None:
        writer.add_tokenizer_model("none")
        return
    description = read_json(folder / "tokenizer.json")
    pieces = _sentencepiece(tokenizer) or _byte_fallback(description)
    if pieces:
        writer.add_tokenizer_model("llama")
        writer.add_tokenizer_pre("default")
        writer.add_add_space_prefix(_has_prefix(description))
    else:
        writer.add_tokenizer_model("gpt2")
        writer.add_tokenizer_pre(_cut(description))
    plain = {index: (text, 0.0, NORMAL) for text, index in description["model"]["vocab"].items()}
    tokens = _with_added(pieces or plain, description, vocab_size)
    writer.add_token_list([text for text, _, _ in tokens])
    if pieces:
        writer.add_token_scores([score for _, score, _ in tokens])
    writer.add_token_types([kind for _, _, kind in tokens])
    special = SpecialVocab(folder, load_merges=not pieces, n_vocab=len(tokens))
    special.add_special_token = {"bos": False, "eos": False} | special.add_special_token
    special.add_to_gguf(writer, quiet=True)


def _with_added(vocabulary: dict[int, Token], description: dict[str, Any], vocab_size: int) -> list[Token]:
    """Return all tokens by id: rows of the model without a token are unused."""
    found = dict(vocabulary)
    for entry in description.get("added_tokens", []):
        text = entry["content"]
        if entry["special"] or _looks_special(text):
            found[entry["id"]] = (text, -1000.0, CONTROL)
        else:
            found[entry["id"]] = (text.replace("▁", " "), -1000.0, USER_DEFINED)
    return [found.get(index, (f"[PAD{index}]", -10000.0, UNUSED)) for index in range(vocab_size)]


def _looks_special(text: str) -> bool:
    """Return whether a token controls a chat although its file does not say so."""
    return text in ("<pad>", "<mask>") or (text[:2], text[-2:]) in (("<|", "|>"), ("<｜", "｜>"))


def _sentencepiece(tokenizer: Tokenizer) -> dict[int, Token]:
    """Return the pieces of a SentencePiece model by id; empty for another tokenizer."""
    if not isinstance(tokenizer.backend, SentencePieceModel):
        return {}
    proto = tokenizer.backend.proto()
    if proto.trainer_spec.model_type != BPE:
        raise _refused("is a SentencePiece model of another kind than BPE")
    if proto.normalizer_spec.precompiled_charsmap or proto.normalizer_spec.remove_extra_whitespaces:
        logger("conversion").warning(
            "the tokenizer normalises texts and llama.cpp does not: texts with two spaces in a row, or with rare forms of characters, "
            "have other tokens there"
        )
    return {index: (one.piece, one.score, one.type) for index, one in enumerate(proto.pieces)}


def _byte_fallback(description: dict[str, Any]) -> dict[int, Token]:
    """Return the pieces of a tokenizer.json that was made from a SentencePiece model; the first merge has the highest score."""
    model = description["model"]
    if model.get("type") != "BPE":
        raise _refused(f"is a {model.get('type')} model")
    if not model.get("byte_fallback"):
        return {}
    made = ["".join(pair.split(" ") if isinstance(pair, str) else pair) for pair in model["merges"]]
    scores: dict[str, float] = {}
    for place, text in enumerate(made):
        scores.setdefault(text, -float(place))
    unknown = model.get("unk_token")
    last = -float(len(made))
    return {index: (text, scores.get(text, last), _kind(text, unknown)) for text, index in model["vocab"].items()}


def _kind(text: str, unknown: str | None) -> int:
    if text == unknown:
        return UNKNOWN
    return BYTE if len(text) == 6 and text.startswith("<0x") and text.endswith(">") else NORMAL


def _has_prefix(description: dict[str, Any]) -> bool:
    """Return whether a space is put before a text."""
    text = json.dumps([description.get("normalizer"), description.get("pre_tokenizer")])
    return '"Prepend"' in text or '"prepend_scheme": "first"' in text or '"prepend_scheme": "always"' in text


def _cut(description: dict[str, Any]) -> str:
    """Return llama.cpp's name of the rule that cuts words."""
    steps = description.get("pre_tokenizer") or {}
    steps = steps["pretokenizers"] if steps.get("type") == "Sequence" else [steps]
    found = tuple(_step(step) for step in steps)
    if found not in _CUTS:
        raise _refused(f"cuts words in a way that is none of {', '.join(_CUTS.values())}")
    return _CUTS[found]


def _step(step: dict[str, Any]) -> tuple:
    kind = step.get("type")
    if kind == "Split":
        pattern = step["pattern"]
        return kind, pattern.get("Regex", pattern.get("String"))
    return kind, step.get(_TOLD.get(str(kind), ""), True if kind == "ByteLevel" else None)


def _refused(why: str) -> ConfigError:
    return ConfigError(
        f"the tokenizer {why}, which is not written as GGUF: drop --quantize, and convert the export with llama.cpp's own script"
    )
