"""Chats to tokens and roles: a chunk's samples, encoded, and their division into training and validation.

The division may be known before (the chats of a second reading) or after (those that were encoded at the first).
"""

import json
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import numpy as np

from megatron_ft.data.chat_encoding import Encoded
from megatron_ft.data.roles import CONTEXT
from megatron_ft.data.tokenizer import Tokenizer
from megatron_ft.errors import DataError, TokenizerError
from tools.pretokenizer.fields import Conversation
from tools.pretokenizer.sampling import SPLITS
from tools.pretokenizer.selection import Selection, token_faults
from tools.pretokenizer.stats import RoleCounts, count_roles

Located = tuple[str, Conversation]
"""A chat with its place in a file, for messages."""


@dataclass
class Tokenized:
    """Samples of one split, concatenated. bad: messages about the chats that could not be encoded, which skipped counts.
    more: samples that chats became beyond one each."""

    ids: np.ndarray
    role_bytes: np.ndarray
    lengths: np.ndarray
    roles: RoleCounts
    skipped: Counter[str] = field(default_factory=Counter)
    skipped_tokens: int = 0
    text: bytes = b""
    bad: list[str] = field(default_factory=list)
    more: int = 0


class Refused(NamedTuple):
    """A chat that cannot be encoded. reason: under which it is counted."""

    chat: int
    reason: str
    message: str


@dataclass
class Encodings:
    """The samples of some chats, concatenated. chats: of which chat each sample is. faults: why a sample is skipped, an index into reasons;
    0: it is not. texts: the samples' texts, if wanted."""

    ids: np.ndarray
    role_bytes: np.ndarray
    lengths: np.ndarray
    roles: RoleCounts
    chats: np.ndarray
    faults: np.ndarray
    reasons: list[str]
    refused: list[Refused]
    texts: list[bytes] | None

    @property
    def nbytes(self) -> int:
        return self.ids.nbytes + self.role_bytes.nbytes

    def divide(self, split: np.ndarray) -> dict[int, Tokenized]:
        """Return the samples by split. split: of each chat, uint8 [chats]; those in none are left out."""
        return {number: self._part(split == number) for number in SPLITS.values() if (split == number).any()}

    def _part(self, chats: np.ndarray) -> Tokenized:
        own = chats[self.chats]
        kept = own & (self.faults == 0)
        refused = [one for one in self.refused if chats[one.chat]]
        faults = np.bincount(self.faults[own])
        skipped = Counter({self.reasons[i]: int(n) for i, n in enumerate(faults) if i and n})
        skipped.update(one.reason for one in refused)
        ids, role_bytes = _take((self.ids, self.role_bytes), self.lengths, kept)
        return Tokenized(
            ids,
            role_bytes,
            self.lengths[kept],
            RoleCounts(self.roles.kinds, self.roles.counts[kept]),
            skipped,
            int(self.lengths[own & (self.faults != 0)].sum()),
            b"" if self.texts is None else b"".join(self.texts[i] for i in np.flatnonzero(kept)),
            [one.message for one in refused],
            int(own.sum()) + len(refused) - int(chats.sum()),
        )


def _take(arrays: Sequence[np.ndarray], lengths: np.ndarray, kept: np.ndarray) -> list[np.ndarray]:
    """Return the tokens of the samples that are kept, of each array."""
    if kept.all():
        return list(arrays)
    stops = np.cumsum(lengths)
    edges = np.flatnonzero(np.diff(np.concatenate([[False], kept, [False]]).astype(np.int8)))
    places = np.concatenate([[0], stops])[edges].reshape(-1, 2)  # of runs of samples
    return [np.concatenate([array[:0], *(array[start:stop] for start, stop in places)]) for array in arrays]


class _HalfCharacter(DataError):
    """A chat with a lone surrogate."""


class Encoder:
    """Encodes chats. chat_format: of get_format(). skip_bad: refuse chats that cannot be encoded one by one, else they are errors.
    text: keep the samples' text."""

    def __init__(self, tokenizer: Tokenizer, chat_format: Any, skip_bad: bool, text: bool):
        self.tokenizer, self.chat_format = tokenizer, chat_format
        self._skip_bad, self._text = skip_bad, text
        self._dtype = np.uint16 if tokenizer.vocab_size <= 65535 else np.int32

    def encode(self, chats: list[Located], selection: Selection) -> Encodings:
        """Encode chats. Raise DataError for the first that cannot be encoded, unless such chats are skipped."""
        refused: list[Refused] = []
        try:
            _check_characters(chats)
            samples = [(number, sample) for number, (_, chat) in enumerate(chats) for sample in self._samples(chat)]
            ids, role_bytes, lengths = self._encode([sample for _, sample in samples])
        except (DataError, TokenizerError):
            samples, (ids, role_bytes, lengths), refused = self._one_by_one(chats)
        return Encodings(
            ids.astype(self._dtype),
            role_bytes,
            lengths,
            count_roles(role_bytes, lengths),
            np.array([number for number, _ in samples], np.int64),
            *token_faults(role_bytes, lengths, selection),
            refused,
            [self._line(sample) for _, sample in samples] if self._text else None,
        )

    def _samples(self, chat: Conversation) -> Sequence[Conversation]:
        """Return the samples that the chat format makes of a chat."""
        return [chat] if _is_plain(chat) else self.chat_format.samples(chat)

    def _one_by_one(self, chats: list[Located]) -> tuple[list[Any], Encoded, list[Refused]]:
        """Return the samples of chats that can be encoded, encoded, and what is wrong with the others. Raise DataError for the first of
        these, unless they are skipped."""
        valid, encoded, refused = [], [], []
        for number, (where, chat) in enumerate(chats):
            try:
                _check_characters([(where, chat)])
                samples = self._samples(chat)
                encoded.append(self._encode(list(samples)))
                valid += [(number, sample) for sample in samples]
            except (DataError, TokenizerError) as error:
                message = str(error) if str(error).startswith(where) else f"{where}: {error}"
                if not self._skip_bad:
                    raise DataError(f"{message}; --on_bad_record skip leaves such chats out") from error
                reason = "half a character" if isinstance(error, _HalfCharacter) else "not sayable in the chat format"
                refused.append(Refused(number, reason, message))
        ids, role_bytes, lengths = (np.concatenate(parts) for parts in zip(self._encode([]), *encoded, strict=True))
        return valid, (ids, role_bytes, lengths), refused

    def _encode(self, chats: list[Conversation]) -> Encoded:
        if not chats:
            return np.empty(0, np.int32), np.empty(0, np.uint8), np.empty(0, np.int64)
        if _is_plain(chats[0]):
            found = self.tokenizer.encode_batch([chat[0]["content"] for chat in chats])
            lengths = np.array([len(ids) for ids in found], np.int64)
            role_bytes = np.array([CONTEXT | chat[0].get("mark_bits", 0) for chat in chats], np.uint8)
            return np.concatenate(found), np.repeat(role_bytes, lengths), lengths
        return self.chat_format.encode_flat(self.tokenizer, chats)

    def _line(self, chat: Conversation) -> bytes:
        text = chat[0]["content"] if _is_plain(chat) else self.chat_format.text(chat)
        return (json.dumps({"text": text}, ensure_ascii=False) + "\n").encode()


def _is_plain(chat: Conversation) -> bool:
    """Return whether a sample is a document without a chat format."""
    return chat[0]["role"] == "text"


def _check_characters(samples: list[Located]) -> None:
    """Raise DataError for a text with a lone surrogate."""
    for where, chat in samples:
        for message in chat:
            if not message["content"].isascii():
                try:
                    message["content"].encode()
                except UnicodeEncodeError:
                    problem = "the text contains a lone surrogate (half a character); repair or remove it"
                    raise _HalfCharacter(f"{where}: {problem}") from None
