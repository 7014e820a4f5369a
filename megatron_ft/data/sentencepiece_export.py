"""Converts a SentencePiece model to a tokenizer.json that gives the same ids for the same text.

Differences that are handled here: SentencePiece puts its dummy prefix before every text, also before one that starts with a space (a
normalizer that prepends does the same, tokenizers' Metaspace does not); its BPE never builds control, unknown or byte pieces from letters
(their merges are omitted); and a run of unknown characters is one unknown token.

The result is exact for BPE without a normalization table, as in the Llama and Mistral families. For other models two differences remain:
tokenizers applies such a table to whole grapheme clusters (rare combining marks differ), and a unigram model may choose differently
between equal scores.
"""

import base64
from pathlib import Path
from typing import Any

from megatron_ft.errors import TokenizerError
from megatron_ft.log import logger

log = logger("data.tokenizer")

SPACE = "▁"
UNIGRAM, BPE = 1, 2  # trainer_spec.model_type
NORMAL, UNKNOWN, CONTROL, USER_DEFINED, UNUSED, BYTE = 1, 2, 3, 4, 5, 6  # kinds of pieces in sentencepiece_model.proto


def describe(proto: Any, path: Path) -> dict[str, Any]:
    """Return a SentencePiece model (a ModelProto) as a tokenizer.json without added tokens. path: its file, for messages.

    Raise TokenizerError for what a tokenizer.json cannot express.
    """
    _refuse(proto, path)
    if not is_exact(proto):
        log.warning("%s: in rare texts the exported tokenizer may cut words in another way than in training", path)
    return {
        "version": "1.0",
        "truncation": None,
        "padding": None,
        "added_tokens": [],
        "normalizer": normalizer(proto),
        "pre_tokenizer": None,  # the model sees a whole text: pieces may span words
        "post_processor": None,  # nothing is added around a text
        "decoder": {"type": "Sequence", "decoders": _decoders(proto.normalizer_spec)},
        "model": _bpe(proto) if proto.trainer_spec.model_type == BPE else _unigram(proto),
    }


def is_exact(proto: Any) -> bool:
    """Return whether the tokenizer.json of a SentencePiece model (a ModelProto) gives the same ids for every text."""
    return proto.trainer_spec.model_type == BPE and not proto.normalizer_spec.precompiled_charsmap


def normalizer(proto: Any) -> dict[str, Any]:
    """Return the normalizer of a SentencePiece model (a ModelProto) as tokenizer.json has it; it adds the space before a text."""
    return {"type": "Sequence", "normalizers": _normalizers(proto.normalizer_spec)}


def _refuse(proto: Any, path: Path) -> None:
    kind, spec = proto.trainer_spec.model_type, proto.normalizer_spec
    reason = None
    if kind not in (UNIGRAM, BPE):
        reason = "its model is neither BPE nor unigram"
    elif proto.trainer_spec.treat_whitespace_as_suffix:
        reason = "it puts spaces behind words"
    elif not spec.escape_whitespaces:
        reason = "it does not mark spaces"
    elif spec.add_dummy_prefix and any(piece.type == USER_DEFINED for piece in proto.pieces):
        reason = "it has user-defined pieces and a dummy prefix"
    if reason:
        raise TokenizerError(
            f"{path}: {reason}, which a tokenizer.json cannot express; export the model without a tokenizer"
        )


def _normalizers(spec: Any) -> list[dict[str, Any]]:
    steps: list[dict[str, Any]] = []
    if spec.precompiled_charsmap:
        charsmap = base64.b64encode(spec.precompiled_charsmap).decode()
        steps.append({"type": "Precompiled", "precompiled_charsmap": charsmap})
    if spec.remove_extra_whitespaces:
        # SentencePiece treats its own mark as a space here.
        steps.append({"type": "Replace", "pattern": {"String": SPACE}, "content": " "})
        steps.append({"type": "Replace", "pattern": {"Regex": " {2,}"}, "content": " "})
        steps.append({"type": "Replace", "pattern": {"Regex": "^ | $"}, "content": ""})
    if spec.add_dummy_prefix:
        steps.append({"type": "Prepend", "prepend": SPACE})
    return [*steps, {"type": "Replace", "pattern": {"String": " "}, "content": SPACE}]


def _decoders(spec: Any) -> list[dict[str, Any]]:
    steps: list[dict[str, Any]] = [
        {"type": "Replace", "pattern": {"String": SPACE}, "content": " "},
        {"type": "ByteFallback"},
        {"type": "Fuse"},
    ]
    return [*steps, {"type": "Strip", "content": " ", "start": 1, "stop": 0}] if spec.add_dummy_prefix else steps


def _bpe(proto: Any) -> dict[str, Any]:
    return {
        "type": "BPE",
        "dropout": None,
        "unk_token": next(piece.piece for piece in proto.pieces if piece.type == UNKNOWN),
        "continuing_subword_prefix": None,
        "end_of_word_suffix": None,
        "fuse_unk": True,
        "byte_fallback": proto.trainer_spec.byte_fallback,
        "ignore_merges": False,
        "vocab": {piece.piece: index for index, piece in enumerate(proto.pieces)},
        "merges": _merges(proto),
    }


def _merges(proto: Any) -> list[tuple[str, str]]:
    """Return all ways to make a piece from two, best pieces first."""
    read = [(piece.piece, piece.score, piece.type) for piece in proto.pieces]
    order = {piece: index for index, (piece, _, kind) in enumerate(read) if kind in (NORMAL, USER_DEFINED)}
    merges: list[tuple[str, str]] = []
    for piece in sorted(order, key=lambda piece: (-read[order[piece]][1], order[piece])):
        cuts = range(1, len(piece))
        ways = [(a, b) for cut in cuts if (a := piece[:cut]) in order and (b := piece[cut:]) in order]
        if len(ways) > 1:
            ways.sort(key=lambda pair: (order[pair[0]], order[pair[1]]))
        merges += ways
    return merges


def _unigram(proto: Any) -> dict[str, Any]:
    # Text must not spell control and byte pieces: they get a score that is never chosen.
    never = min((piece.score for piece in proto.pieces if piece.type == NORMAL), default=0.0) - 1000.0
    out_of_reach = {CONTROL, BYTE, UNKNOWN}
    return {
        "type": "Unigram",
        "unk_id": next(index for index, piece in enumerate(proto.pieces) if piece.type == UNKNOWN),
        "vocab": [[piece.piece, never if piece.type in out_of_reach else piece.score] for piece in proto.pieces],
        "byte_fallback": proto.trainer_spec.byte_fallback,
    }
