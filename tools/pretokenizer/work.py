"""The work on one chunk of a file: read and select its samples, then count or tokenize them.

A worker gets all settings at its start (WorkerSettings) and keeps no state between chunks, so any number of workers gives the same
samples in the same order. It writes nothing.
"""

from collections import Counter
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from itertools import islice
from typing import Any

import numpy as np

from megatron_ft.data.chat_format import get_format
from megatron_ft.data.roles import ASSISTANT, MARKED, ROLES, WEIGHT_SHIFT
from megatron_ft.data.template_options import TemplateOptions
from megatron_ft.data.tokenizer import Tokenizer, load_tokenizer
from megatron_ft.errors import DataError
from tools.pretokenizer import duplicates
from tools.pretokenizer.chunk import Chunk
from tools.pretokenizer.encode import Encoder, Encodings, Located, Tokenized
from tools.pretokenizer.fields import Conversation
from tools.pretokenizer.lines import parse
from tools.pretokenizer.readers import get_reader
from tools.pretokenizer.sampling import MARK
from tools.pretokenizer.selection import Selection, in_order, language_fault, refuses
from tools.pretokenizer.stats import packing_row
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
    read. encodings: of all samples, if they were wanted and have no weights."""

    sizes: np.ndarray
    hashes: np.ndarray | None
    signatures: np.ndarray | None
    left_out: Counter[str]
    bad: list[str]
    weights: set[float]
    unread: Counter[str]
    encodings: Encodings | None


class Worker:
    """Works on chunks. threads: of the tokenizer; 1 if there are several workers."""

    def __init__(self, settings: WorkerSettings, tokenizer: Tokenizer | None = None, threads: int | None = None):
        self.settings = settings
        self.tokenizer = tokenizer or _load(settings)
        if threads is not None:
            self.tokenizer.backend.threads = threads
        self.chat_format = get_format(settings.chat_format, self.tokenizer, settings.template)
        self.encoder = Encoder(self.tokenizer, self.chat_format, settings.skip_bad, settings.text)

    def count(self, job: Job, chunk: Chunk, encode: bool = False) -> Counted:
        """Read a chunk. encode: also encode its samples, all of them and without marks, so that it need not be read again."""
        left_out, bad = Counter[str](), list[str]()
        unread = Unread(self._known(job))
        groups = self._read(job, chunk, left_out, bad, unread)
        located = [(where, chat) for where, group in groups for chat in group]
        chats = [chat for _, chat in located]
        kind = self.settings.duplicates
        more = [message for chat in chats for message in chat if len(message) > 2]
        weights = {message["weight"] for message in more if "weight" in message}
        return Counted(
            sizes=np.array([len(group) for _, group in groups], np.int32),
            hashes=None if kind == "keep" else duplicates.fingerprints(chats),
            signatures=duplicates.signatures(chats) if kind == "near" else None,
            left_out=left_out,
            bad=bad,
            weights=weights,
            unread=unread.counted,
            encodings=self._encode(job, located, [], [1.0]) if encode and not weights else None,
        )

    def tokenize(self, job: Job, chunk: Chunk, wanted: np.ndarray, weights: Sequence[float]) -> dict[int, Tokenized]:
        """Return the chunk's samples by split. wanted: assignment of each sample, uint8 [samples], see sampling.py. weights: the table."""
        samples = [(where, chat) for where, group in self._read(job, chunk, Counter(), []) for chat in group]
        if len(samples) != len(wanted):
            raise DataError(f"{chunk.name}: the file changed while it was read; start again when it is complete")
        chosen = np.flatnonzero(wanted & 3)
        marked = np.flatnonzero(wanted[chosen] & MARK).tolist()
        encodings = self._encode(job, [samples[i] for i in chosen], marked, weights)
        return encodings.divide(wanted[chosen] & 3)

    def _encode(self, job: Job, chats: list[Located], marked: list[int], weights: Sequence[float]) -> Encodings:
        """Encode chats. marked: which of them are marked as a whole."""
        whole = set(marked)
        if (
            whole
            or len(weights) > 1
            or any("marked" in message for _, chat in chats for message in chat if len(message) > 2)
        ):
            chats = [(where, self._with_mark_bits(chat, i in whole, weights)) for i, (where, chat) in enumerate(chats)]
        return self.encoder.encode(chats, job.selection)

    def chats(self, job: Job, chunk: Chunk) -> list[Conversation]:
        """Return the chats of a chunk as they were read, in the order in which `count` counts them."""
        return [chat for _, group in self._read(job, chunk, Counter(), []) for chat in group]

    def packing(self, lengths: np.ndarray, seq_length: int) -> dict[str, Any]:
        """Return how samples of these lengths fill rows."""
        return packing_row(lengths, seq_length)

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
        result = []
        for message in chat:
            to_mark = (marked or "marked" in message) and ROLES.get(message["role"]) != ASSISTANT
            mark_bits = MARKED if to_mark else 0
            mark_bits |= weights.index(message.get("weight", 1.0)) << WEIGHT_SHIFT
            result.append({**{key: value for key, value in message.items() if key != "marked"}, "mark_bits": mark_bits})
        return result


def _load(settings: WorkerSettings) -> Tokenizer:
    tokenizer = load_tokenizer(settings.tokenizer, settings.extra_tokens)
    if settings.hasten:
        tokenizer.hasten()
    return tokenizer
