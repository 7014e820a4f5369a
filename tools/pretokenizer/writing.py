"""Tokenizes what was planned and writes the shards of both splits in one pass.

Nothing appears under a final name before all samples of both splits are written.
"""

import contextlib
import gzip
import itertools
import json
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import IO, Any, cast

import numpy as np

from megatron_ft.data.chat_format import ChatFormat
from megatron_ft.data.roles import ASSISTANT
from megatron_ft.data.shards import ShardWriter
from megatron_ft.data.tokenizer import Tokenizer
from megatron_ft.errors import DataError
from megatron_ft.files import atomic_file
from tools.pretokenizer.readers import Conversation
from tools.pretokenizer.sampling import SPLITS, Plan
from tools.pretokenizer.settings import Settings
from tools.pretokenizer.sources import Source
from tools.pretokenizer.stats import Tally, total

BATCH = 512  # conversations tokenized together: enough for all cores, little memory

Planned = list[tuple[Source, Plan]]


def write(
    settings: Settings, tokenizer: Tokenizer, chat_format: ChatFormat, planned: Planned, text: str | None
) -> dict[str, list[Tally]]:
    """Write shards; the tallies, one a source, of every split that was written.

    text: ending of a file with the chats' text beside each split's shards, None for no such file.
    A split of which nothing is left is not written. Raises DataError where that is the training split.
    """
    with contextlib.ExitStack() as stack:
        splits = {
            number: stack.enter_context(_Split(Path(f"{settings.prefix}-{name}"), tokenizer, chat_format, text))
            for name, number in SPLITS.items()
        }
        for source, plan in planned:
            digest = source.digest()
            for name, number in SPLITS.items():
                splits[number].begin(source, digest, plan.available[name])
            for batch in _batches(source.chosen(plan.split), BATCH):
                encoded = chat_format.encode_many(tokenizer, [chat for _, chat in batch])
                for (number, chat), (ids, roles) in zip(batch, encoded, strict=True):
                    splits[number].add(ids, roles, _fault(roles, settings.min_assistant_tokens), chat)
        if not splits[SPLITS["train"]].accepted:
            raise DataError(_nothing_left(planned, splits[SPLITS["train"]].tallies))
    return {name: splits[number].tallies for name, number in SPLITS.items() if splits[number].accepted}


class _Split:
    """One of train and val while it is written; a context manager that writes nothing where nothing was accepted."""

    def __init__(self, prefix: Path, tokenizer: Tokenizer, chat_format: ChatFormat, text: str | None):
        described = {"name": chat_format.name, "stop_token": chat_format.stop_token}
        self._writer = ShardWriter(prefix, tokenizer.vocab_size, tokenizer.info(), described)
        self._text_path = None if text is None else Path(f"{prefix}{text}")
        self._render: Callable[[Conversation], str] = chat_format.text
        self.tallies: list[Tally] = []

    @property
    def accepted(self) -> int:
        return total(self.tallies).accepted

    def begin(self, source: Source, digest: str, available: int) -> None:
        """What is added from here on comes from this source."""
        self._writer.source(source.name, str(source.path), digest)
        self.tallies.append(Tally(source.name, available))

    def add(self, ids: np.ndarray, roles: np.ndarray, fault: str | None, chat: Conversation) -> None:
        """Write a sample, or count why not. ids, roles: [tokens]."""
        if fault is not None:
            self.tallies[-1].skip(fault, len(ids))
            return
        self.tallies[-1].accept(roles)
        self._writer.add(ids, roles)
        if self._text is not None:
            self._text.write((json.dumps({"text": self._render(chat)}, ensure_ascii=False) + "\n").encode())

    def __enter__(self) -> "_Split":
        with contextlib.ExitStack() as stack:
            stack.enter_context(self._writer)
            self._text = None if self._text_path is None else stack.enter_context(_text_file(self._text_path))
            self._stack = stack.pop_all()
        return self

    def __exit__(self, *error: Any) -> None:
        if error[0] is None and not self.accepted:
            error = (_Nothing, _Nothing(), None)  # what is open drops its temporary files, as after a failure
        self._stack.__exit__(*error)


class _Nothing(Exception):
    """Tells open files that they are not wanted; never leaves this file."""


@contextlib.contextmanager
def _text_file(path: Path) -> Iterator[IO[bytes]]:
    with atomic_file(path) as file:
        if path.suffix != ".gz":
            yield file
            return
        # No name and no time in the archive: the same chats give the same bytes.
        with gzip.GzipFile(filename="", mode="wb", fileobj=file, mtime=0) as packed:
            yield cast(IO[bytes], packed)


def _fault(roles: np.ndarray, min_assistant_tokens: int | None) -> str | None:
    """Why a sample is skipped, or None."""
    if not len(roles):
        return "no tokens"
    if min_assistant_tokens is not None and np.count_nonzero(roles == ASSISTANT) < min_assistant_tokens:
        return f"fewer than {min_assistant_tokens} assistant tokens"
    return None


def _batches(items: Iterable[Any], size: int) -> Iterator[list[Any]]:
    iterator = iter(items)
    while batch := list(itertools.islice(iterator, size)):
        yield batch


def _nothing_left(planned: Planned, tallies: list[Tally]) -> str:
    reasons = sum((source.left_out for source, _ in planned), total(tallies).skipped)
    told = ", ".join(f"{reason}: {count}" for reason, count in sorted(reasons.items())) or "the files hold no chats"
    paths = ", ".join(str(source.path) for source, _ in planned)
    return f"{paths}: no training sample is left ({told}); check the settings"
