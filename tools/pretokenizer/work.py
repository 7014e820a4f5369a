"""The work on one chunk of a file: read and select its samples, then count or tokenize them.

A worker gets all settings at its start (WorkerSettings) and keeps no state between chunks, so any number of workers gives the same
samples in the same order. It writes nothing.
"""

import json
from collections import Counter
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from itertools import islice
from typing import Any, NamedTuple

import numpy as np

from megatron_ft.data.chat_encoding import Encoded
from megatron_ft.data.chat_format import get_format
from megatron_ft.data.roles import ASSISTANT, CONTEXT, MARKED, ROLES, WEIGHT_SHIFT
from megatron_ft.data.template_options import TemplateOptions
from megatron_ft.data.tokenizer import Tokenizer, load_tokenizer
from megatron_ft.errors import DataError, TokenizerError
from tools.pretokenizer import duplicates
from tools.pretokenizer.chunk import Chunk
from tools.pretokenizer.fields import Conversation
from tools.pretokenizer.lines import parse
from tools.pretokenizer.readers import get_reader
from tools.pretokenizer.sampling import MARK, SPLITS
from tools.pretokenizer.selection import Selection, in_order, language_fault, refuses, token_faults
from tools.pretokenizer.unread import LANGUAGE, Reads, Unread, written


@dataclass(frozen=True)
class Job:
    """The reading of one dataset's records."""

    name: str
    reader: str
    options: Any
    selection: Selection


@dataclass(frozen=True)
class WorkerSettings:
    """The settings of a worker. text: also return every sample as text. duplicates: keep, exact or near.
    hasten: encode with gigatoken, see tokenizer.Tokenizer.hasten."""

    jobs: Sequence[Job]
    tokenizer: str
    extra_tokens: Sequence[str]
    chat_format: str
    skip_bad: bool
    duplicates: str
    text: bool
    template: TemplateOptions = field(default_factory=TemplateOptions)
    hasten: bool = False


@dataclass
class Counted:
    """The counted samples of a chunk. sizes: samples per record. left_out, bad: records that were left out. unread: keys that were not
    read."""

    sizes: np.ndarray
    hashes: np.ndarray | None
    signatures: np.ndarray | None
    left_out: Counter[str]
    bad: list[str]
    weights: set[float]
    unread: Counter[str]


@dataclass
class Tokenized:
    """A chunk's samples of one split, concatenated. bad: messages about the chats that could not be encoded, which skipped counts.
    more: samples that chats became beyond one each."""

    ids: np.ndarray
    role_bytes: np.ndarray
    lengths: np.ndarray
    skipped: Counter[str] = field(default_factory=Counter)
    skipped_tokens: int = 0
    text: bytes = b""
    bad: list[str] = field(default_factory=list)
    more: int = 0


class _Refused(NamedTuple):
    """A chat that cannot be encoded. reason: under which it is counted."""

    reason: str
    message: str


class _HalfCharacter(DataError):
    """A chat with a lone surrogate."""


class Worker:
    """Works on chunks. threads: of the tokenizer; 1 if there are several workers."""

    def __init__(self, settings: WorkerSettings, tokenizer: Tokenizer | None = None, threads: int | None = None):
        self.settings = settings
        self.tokenizer = tokenizer or _load(settings)
        if threads is not None:
            self.tokenizer.backend.threads = threads
        self.chat_format = get_format(settings.chat_format, self.tokenizer, settings.template)
        self.dtype = np.uint16 if self.tokenizer.vocab_size <= 65535 else np.int32

    def count(self, job: Job, chunk: Chunk) -> Counted:
        left_out, bad = Counter[str](), list[str]()
        unread = Unread(self._known(job))
        groups = [samples for _, samples in self._read(job, chunk, left_out, bad, unread)]
        chats = [chat for group in groups for chat in group]
        kind = self.settings.duplicates
        return Counted(
            sizes=np.array([len(group) for group in groups], np.int32),
            hashes=None if kind == "keep" else duplicates.fingerprints(chats),
            signatures=duplicates.signatures(chats) if kind == "near" else None,
            left_out=left_out,
            bad=bad,
            weights={message["weight"] for chat in chats for message in chat if "weight" in message},
            unread=unread.counted,
        )

    def tokenize(self, job: Job, chunk: Chunk, wanted: np.ndarray, weights: Sequence[float]) -> dict[int, Tokenized]:
        """Return the chunk's samples by split. wanted: assignment of each sample, uint8 [samples], see sampling.py. weights: the table."""
        samples = [(where, chat) for where, group in self._read(job, chunk, Counter(), []) for chat in group]
        if len(samples) != len(wanted):
            raise DataError(f"{chunk.name}: the file changed while it was read; start again when it is complete")
        result = {}
        for number in SPLITS.values():
            chosen = np.flatnonzero(wanted & 3 == number)
            if len(chosen):
                picked = [
                    (samples[i][0], self._with_mark_bits(samples[i][1], bool(wanted[i] & MARK), weights))
                    for i in chosen
                ]
                result[number] = self._tokenize(job, picked)
        return result

    def texts(self, job: Job, chunk: Chunk, count: int) -> list[str]:
        """Return what is said in the first chats of a chunk."""
        found = []
        for where, record in islice(parse(chunk, []), count):
            with suppress(DataError):
                chats = get_reader(job.reader).convert(record, where, job.options, Counter())
                found += [
                    message["content"] for chat in chats for message in chat if isinstance(message["content"], str)
                ]
        return found

    def _read(
        self, job: Job, chunk: Chunk, left_out: Counter[str], bad: list[str], unread: Unread | None = None
    ) -> list[tuple[str, list[Conversation]]]:
        """Return every record's samples with its location. unread: takes the keys that the reader does not know."""
        reader, skip = get_reader(job.reader), bad if self.settings.skip_bad else None
        languages, phrases = job.selection.wanted_languages, job.selection.phrases
        plain = job.selection.role_order == "keep" and not phrases
        result = []
        for where, record in parse(chunk, skip):
            if languages and (fault := language_fault(record, languages)):
                left_out[fault] += 1
                continue
            try:
                samples = reader.convert(record, where, job.options, left_out)
                samples = samples if plain else self._select(samples, job.selection, phrases, left_out)
            except DataError as error:
                if skip is None:
                    raise
                bad.append(str(error))
                continue
            if unread is not None:
                unread.add(record)
            result.append((where, samples))
        return result

    def _known(self, job: Job) -> Reads:
        known = written(get_reader(job.reader).known(job.options), self.chat_format)
        return {**known, **LANGUAGE} if job.selection.wanted_languages else known

    def _select(
        self, samples: list[Conversation], selection: Selection, phrases: tuple[str, ...], left_out: Counter[str]
    ) -> list[Conversation]:
        selected = []
        for chat in samples:
            chat, fault = in_order(chat, selection.role_order)
            if fault is None and phrases and refuses(chat, phrases):
                fault = "refusal phrase"
            if fault is None:
                selected.append(chat)
            else:
                left_out[fault] += 1
        return selected

    def _with_mark_bits(self, chat: Conversation, marked: bool, weights: Sequence[float]) -> Conversation:
        """Return the chat with `mark_bits` in its messages: mark and weight, as bits of the role byte."""
        if not marked and len(weights) == 1 and not any("marked" in message for message in chat):
            return chat
        result = []
        for message in chat:
            to_mark = (marked or "marked" in message) and ROLES.get(message["role"]) != ASSISTANT
            mark_bits = MARKED if to_mark else 0
            mark_bits |= weights.index(message.get("weight", 1.0)) << WEIGHT_SHIFT
            result.append({**{key: value for key, value in message.items() if key != "marked"}, "mark_bits": mark_bits})
        return result

    def _tokenize(self, job: Job, chats: list[tuple[str, Conversation]]) -> Tokenized:
        bad: list[_Refused] = []
        try:
            _check_characters(chats)
            samples = [(where, sample) for where, chat in chats for sample in self._samples(chat)]
            ids, role_bytes, lengths = self._encode([chat for _, chat in samples])
        except (DataError, TokenizerError):
            samples, (ids, role_bytes, lengths), bad = self._one_by_one(chats)
        faults, reasons = token_faults(role_bytes, lengths, job.selection)
        accepted = faults == 0
        skipped = Counter({reasons[i]: int(n) for i, n in enumerate(np.bincount(faults)) if i and n})
        skipped.update(refused.reason for refused in bad)
        result = Tokenized(ids, role_bytes, lengths, skipped, int(lengths[~accepted].sum()))
        result.bad = [refused.message for refused in bad]
        result.more = len(samples) + len(bad) - len(chats)
        if not accepted.all():
            by_token = np.repeat(accepted, lengths)
            result.ids, result.role_bytes, result.lengths = ids[by_token], role_bytes[by_token], lengths[accepted]
        result.ids = result.ids.astype(self.dtype)
        if self.settings.text:
            kept = (sample for (_, sample), keep in zip(samples, accepted, strict=True) if keep)
            texts = (json.dumps({"text": self._text(sample)}, ensure_ascii=False) for sample in kept)
            result.text = "".join(text + "\n" for text in texts).encode()
        return result

    def _samples(self, chat: Conversation) -> Sequence[Conversation]:
        """Return the samples that the chat format makes of a chat."""
        return [chat] if _is_plain(chat) else self.chat_format.samples(chat)

    def _one_by_one(self, chats: list[tuple[str, Conversation]]) -> tuple[list[Any], Encoded, list[_Refused]]:
        """Return the samples of chats that can be encoded, encoded, and what is wrong with the others. Raise DataError for the first of
        these, unless they are skipped."""
        valid, encoded, refused = [], [], []
        for where, chat in chats:
            try:
                _check_characters([(where, chat)])
                samples = self._samples(chat)
                encoded.append(self._encode(list(samples)))
                valid += [(where, sample) for sample in samples]
            except (DataError, TokenizerError) as error:
                message = str(error) if str(error).startswith(where) else f"{where}: {error}"
                if not self.settings.skip_bad:
                    raise DataError(f"{message}; --on_bad_record skip leaves such chats out") from error
                reason = "half a character" if isinstance(error, _HalfCharacter) else "not sayable in the chat format"
                refused.append(_Refused(reason, message))
        nothing = (np.empty(0, np.int32), np.empty(0, np.uint8), np.empty(0, np.int64))
        ids, role_bytes, lengths = (np.concatenate(parts) for parts in zip(nothing, *encoded, strict=True))
        return valid, (ids, role_bytes, lengths), refused

    def _encode(self, chats: list[Conversation]) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        if chats and _is_plain(chats[0]):
            found = self.tokenizer.encode_batch([chat[0]["content"] for chat in chats])
            lengths = np.array([len(ids) for ids in found], np.int64)
            role_bytes = np.array([CONTEXT | chat[0].get("mark_bits", 0) for chat in chats], np.uint8)
            return np.concatenate(found), np.repeat(role_bytes, lengths), lengths
        return self.chat_format.encode_flat(self.tokenizer, chats)

    def _text(self, chat: Conversation) -> str:
        return chat[0]["content"] if _is_plain(chat) else self.chat_format.text(chat)


def _load(settings: WorkerSettings) -> Tokenizer:
    tokenizer = load_tokenizer(settings.tokenizer, settings.extra_tokens)
    if settings.hasten:
        tokenizer.hasten()
    return tokenizer


def _is_plain(chat: Conversation) -> bool:
    """Return whether a sample is a document without a chat format."""
    return chat[0]["role"] == "text"


def _check_characters(samples: list[tuple[str, Conversation]]) -> None:
    """Raise DataError for a text with a lone surrogate."""
    for where, chat in samples:
        for message in chat:
            if not message["content"].isascii():
                try:
                    message["content"].encode()
                except UnicodeEncodeError:
                    problem = "the text contains a lone surrogate (half a character); repair or remove it"
                    raise _HalfCharacter(f"{where}: {problem}") from None


__all__ = ["Counted", "Job", "Tokenized", "TokenizerError", "Worker", "WorkerSettings"]
