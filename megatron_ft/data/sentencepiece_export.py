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

Pieces = list[tuple[str, float, int]]
"""Text, score and kind of each piece, in the order of ids."""


def describe(proto: Any, path: Path, own_spaces: bool = True) -> dict[str, Any]:
    """Return a SentencePiece model (a ModelProto) as a tokenizer.json. path: its file, for messages. The added tokens are the pieces that
    are looked for in text ("user defined"). own_spaces: False if another rule for spaces takes the place of the model's.

    Raise TokenizerError for what a tokenizer.json cannot express.
    """
    pieces: Pieces = [(piece.piece, piece.score, piece.type) for piece in proto.pieces]
    _refuse(proto, pieces, path, own_spaces)
    if not is_exact(proto):
        log.warning("%s: in rare texts the exported tokenizer may cut words in another way than in training", path)
    return {
        "version": "1.0",
        "truncation": None,
        "padding": None,
        "added_tokens": _looked_for(pieces),
        "normalizer": normalizer(proto),
        "pre_tokenizer": None,  # the model sees a whole text: pieces may span words
        "post_processor": None,  # nothing is added around a text
        "decoder": {"type": "Sequence", "decoders": _decoders(proto.normalizer_spec)},
        "model": (_bpe if proto.trainer_spec.model_type == BPE else _unigram)(pieces, proto.trainer_spec.byte_fallback),
    }


def is_exact(proto: Any) -> bool:
    """Return whether the tokenizer.json of a SentencePiece model (a ModelProto) gives the same ids for every text."""
    return proto.trainer_spec.model_type == BPE and not proto.normalizer_spec.precompiled_charsmap


def normalizer(proto: Any) -> dict[str, Any]:
    """Return the normalizer of a SentencePiece model (a ModelProto) as tokenizer.json has it; it adds the space before a text."""
    return {"type": "Sequence", "normalizers": _normalizers(proto.normalizer_spec)}


def _refuse(proto: Any, pieces: Pieces, path: Path, own_spaces: bool) -> None:
    kind, spec = proto.trainer_spec.model_type, proto.normalizer_spec
    reason = None
    if kind not in (UNIGRAM, BPE):
        reason = "its model is neither BPE nor unigram"
    elif proto.trainer_spec.treat_whitespace_as_suffix:
        reason = "it puts spaces behind words"
    elif not spec.escape_whitespaces:
        reason = "it does not mark spaces"
    elif own_spaces and spec.add_dummy_prefix and any(kind == USER_DEFINED for _, _, kind in pieces):
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


def _looked_for(pieces: Pieces) -> list[dict[str, Any]]:
    """Return the pieces that are looked for in text with marked spaces. One with a space of its own never occurs there."""
    flags = {"single_word": False, "lstrip": False, "rstrip": False, "normalized": True, "special": False}
    found = [
        (index, piece) for index, (piece, _, kind) in enumerate(pieces) if kind == USER_DEFINED and " " not in piece
    ]
    return [{"id": index, "content": piece, **flags} for index, piece in found]


def _bpe(pieces: Pieces, byte_fallback: bool) -> dict[str, Any]:
    return {
        "type": "BPE",
        "dropout": None,
        "unk_token": next(piece for piece, _, kind in pieces if kind == UNKNOWN),
        "continuing_subword_prefix": None,
        "end_of_word_suffix": None,
        "fuse_unk": True,
        "byte_fallback": byte_fallback,
        "ignore_merges": False,
        "vocab": {piece: index for index, (piece, _, _) in enumerate(pieces)},
        "merges": _merges(pieces),
    }


def _merges(pieces: Pieces) -> list[tuple[str, str]]:
    """Return all ways to make a piece from two, best pieces first."""
    order = {piece: index for index, (piece, _, kind) in enumerate(pieces) if kind in (NORMAL, USER_DEFINED)}
    merges: list[tuple[str, str]] = []
    for piece in sorted(order, key=lambda piece: (-pieces[order[piece]][1], order[piece])):
        cuts = range(1, len(piece))
        ways = [(a, b) for cut in cuts if (a := piece[:cut]) in order and (b := piece[cut:]) in order]
        if len(ways) > 1:
            ways.sort(key=lambda pair: (order[pair[0]], order[pair[1]]))
        merges += ways
    return merges


def _unigram(pieces: Pieces, byte_fallback: bool) -> dict[str, Any]:
    # Text must not spell control and byte pieces: they get a score that is never chosen.
    never = min((score for _, score, kind in pieces if kind == NORMAL), default=0.0) - 1000.0
    out_of_reach = {CONTROL, BYTE, UNKNOWN}
    return {
        "type": "Unigram",
        "unk_id": next(index for index, (_, _, kind) in enumerate(pieces) if kind == UNKNOWN),
        "vocab": [[piece, never if kind in out_of_reach else score] for piece, score, kind in pieces],
        "byte_fallback": byte_fallback,
    }
