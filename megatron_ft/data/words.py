"""Tokenizes each word only once, for tokenizers whose tokens never cross the bounds of words.

For these, the tokens of a text are those of its words in sequence. Words are repeated, so most are found in a table, which is several
times as fast as the libraries. For SentencePiece models a word is a run of spaces and what follows, or a newline and what follows; for
byte-level tokenizers, which cut text before they merge, it is the text between single spaces. Files are read in other modules.
"""

from __future__ import annotations

import re
from collections.abc import Callable
from typing import Any

import numpy as np

MOST, LONGEST = 250_000, 32  # words remembered, about 50 MB; characters of such a word
SPACE = "\u2581"
_pieces = re.compile(r"\n[^ \n]*| +[^ \n]*").findall
# A single space between two other characters begins a word; all other white space stays inside of one.
_between_spaces = re.compile(r"\s*\S+(?:(?! \S)\s+\S*)*|\s+").findall


class Words(dict[str, bytes]):
    """Word -> the bytes of its ids, int32. encode: ids of a text by itself."""

    def __init__(self, encode: Callable[[str], list[int]]):
        self._encode = encode

    def __missing__(self, word: str) -> bytes:
        found = np.array(self._ids(word), np.int32).tobytes()
        if len(word) <= LONGEST:
            if len(self) >= MOST:
                self.clear()
            self[word] = found
        return found

    def _ids(self, word: str) -> list[int]:
        return self._encode(word)

    def encode(self, text: str) -> np.ndarray:
        """Return the ids of a text, int32 [tokens], read-only."""
        return np.frombuffer(b"".join(map(self.__getitem__, _between_spaces(text))), np.int32)


class PieceWords(Words):
    """For a SentencePiece model, which adds a space in front of a text. A word is stored without the first of its spaces."""

    def _ids(self, word: str) -> list[int]:
        # The added space is removed before a newline; an empty text gets none.
        with_space = self._encode(word or "\n")
        return with_space[1:] if word[:1] == "\n" else with_space if word else with_space[:1]

    def encode(self, text: str) -> np.ndarray:
        if SPACE in text:  # the model treats it as a space, the table would not
            return np.array(self._encode(text), np.int32)
        if "  " in text or " \n" in text or text[:1] in " \n" or text[-1] == " ":
            words = [word[word[0] == " " :] for word in _pieces(f" {text}")] if text else []
        else:  # single spaces between words, as mostly: three times as fast
            words = text.replace("\n", " \n").split(" ")
        return np.frombuffer(b"".join(map(self.__getitem__, words)), np.int32)


# How published byte-level tokenizers cut text: none of these makes one token of a character, a single space and another character.
CUTS = (
    # GPT-4, Llama-3
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+",
    # Qwen
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+",
    # GPT-2, if it is written out
    r"'s|'t|'re|'ve|'m|'ll|'d| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+",
)


def are_between_spaces(description: dict[str, Any]) -> bool:
    """Return whether words of this tokenizer.json can be encoded one by one: byte-level, cut as CUTS or as GPT-2 does, no token of its own
    that is looked for in text and holds or swallows white space."""
    step = description.get("pre_tokenizer") or {}
    steps = step.get("pretokenizers", [step])
    last = steps[-1]
    if last.get("type") != "ByteLevel" or last.get("add_prefix_space"):
        return False
    by_regex = last.get("use_regex", True) and len(steps) == 1
    split = len(steps) == 2 and steps[0].get("type") == "Split" and not last.get("use_regex", True)
    cut = split and steps[0].get("behavior") == "Isolated" and not steps[0].get("invert")
    own = [token for token in description.get("added_tokens", []) if not token.get("special")]
    return (
        (by_regex or (cut and steps[0].get("pattern", {}).get("Regex") in CUTS))
        and description.get("normalizer") in (None, {"type": "NFC"})
        and description["model"].get("type", "BPE") == "BPE"
        and not description["model"].get("dropout")
        and not any(
            token.get("lstrip") or token.get("rstrip") or token.get("single_word") or re.search(r"\s", token["content"])
            for token in own
        )
    )
