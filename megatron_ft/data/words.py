"""Tokenizing a text word by word, every word once: for SentencePiece models in which no piece reaches over a space or a newline.

Then the pieces of a text are those of its words one after another, whatever stands around them: merging is local. Words come again
and again, so most are found in a table, several times as fast as the library encodes. Knows nothing of files and models beyond
the function that encodes a text.
"""

from __future__ import annotations

import re
from collections.abc import Callable
from typing import Any

import numpy as np

MOST, LONGEST = 250_000, 32  # words remembered, about 50 MB; characters of such a word
# A word is the run of spaces before it and what follows up to the next space or newline, or a newline and what follows.
_words = re.compile(r"\n[^ \n]*| +[^ \n]*").findall
SPACE = "\u2581"


class Words(dict[str, bytes]):
    """Word -> the bytes of its ids, int32. encode: ids of a text, to which the model itself adds a space in front."""

    def __init__(self, encode: Callable[[str], list[int]]):
        self._encode = encode

    def __missing__(self, word: str) -> bytes:
        # The space that the model adds stands for the first of a word's own; before a newline it has to go. To nothing it adds none.
        with_space = self._encode("\n" if word == " " else word[word[0] == " " :])
        ids = with_space[:1] if word == " " else with_space[1:] if word[0] == "\n" else with_space
        found = np.array(ids, np.int32).tobytes()
        if len(word) <= LONGEST:
            if len(self) >= MOST:
                self.clear()
            self[word] = found
        return found

    def encode(self, text: str) -> np.ndarray:
        """The ids of a text, int32 [tokens], read-only."""
        if SPACE in text:  # the model cannot tell it from a space, we could
            return np.array(self._encode(text), np.int32)
        # An empty text gets no space in front, and has no tokens.
        return np.frombuffer(b"".join(map(self.__getitem__, _words(f" {text}"))) if text else b"", np.int32)


def are_apart(proto: Any) -> bool:
    """Whether words of this model (a ModelProto) can be encoded one by one: byte pair encoding, text taken as it is, and no piece
    that reaches over a space or holds a newline."""
    from megatron_ft.data.sentencepiece_model import NORMAL, USER_DEFINED

    rules, trained = proto.normalizer_spec, proto.trainer_spec
    return (
        trained.model_type == 2  # BPE
        and not rules.precompiled_charsmap
        and rules.add_dummy_prefix
        and not rules.remove_extra_whitespaces
        and rules.escape_whitespaces
        and not trained.treat_whitespace_as_suffix
        and not any(
            SPACE in piece.piece.lstrip(SPACE) or "\n" in piece.piece or " " in piece.piece
            for piece in proto.pieces
            if piece.type in (NORMAL, USER_DEFINED)
        )
    )
