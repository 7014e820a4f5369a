"""Tokenizes the selected samples and writes the shards of both splits in one pass.

No file gets its final name before all samples of both splits are written. The last file is the manifest of the training split: if it
exists, the run has finished, else it was interrupted.
"""

import contextlib
import gzip
import os
import re
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import IO, Any, cast

import numpy as np

from megatron_ft.data.chat_format import describe
from megatron_ft.data.manifest import manifest_path
from megatron_ft.data.shards import ENDINGS, ShardWriter, open_shards, remove_shards
from megatron_ft.data.tokenizer import Tokenizer
from megatron_ft.errors import DataError
from megatron_ft.files import atomic_file
from megatron_ft.log import logger
from tools.pretokenizer import mixing
from tools.pretokenizer.encode import Tokenized
from tools.pretokenizer.pool import Pool
from tools.pretokenizer.progress import Progress, warn_skipped
from tools.pretokenizer.sampling import SPLITS
from tools.pretokenizer.settings import Settings
from tools.pretokenizer.sources import Source
from tools.pretokenizer.stats import Tally, count_roles, total

log = logger("pretokenize")


@dataclass
class Written:
    """A written split. tallies: one per source, before mixing. mixed: the same after mixing, if there is a mix. lengths: of the samples
    in the shards, in tokens."""

    tallies: list[Tally]
    lengths: np.ndarray
    mix: list[mixing.Portion] = field(default_factory=list)
    mixed: list[Tally] = field(default_factory=list)


def write(
    settings: Settings,
    tokenizer: Tokenizer,
    chat_format: Any,
    sources: list[Source],
    weights: list[float],
    pool: Pool,
    progress: Progress,
    text: str | None,
    beside: Callable[[dict[str, Written]], None],
) -> dict[str, Written]:
    """Write the shards; return a summary of every written split.

    beside: writes the files beside the shards, before the shards get their final names. weights: the table of message weights.
    text: ending of the file with the chats' text beside each split's shards, None for no file. A split without samples is not
    written. Raise DataError if that is the training split.
    """

    def writer(prefix: Path | str) -> ShardWriter:
        file = {"file": str(settings.vocab_file)}
        return ShardWriter(
            prefix, tokenizer.vocab_size, {**tokenizer.info(), **file}, describe(chat_format), weights, parts=True
        )

    train_prefix = Path(f"{settings.prefix}-train")
    spool = settings.prefix.parent / f".{settings.prefix.name}-spool.tmp-{os.getpid()}" if settings.mix_by else None
    with contextlib.ExitStack() as stack:
        stack.enter_context(_writable(settings.prefix))
        # The first one entered is renamed last: the training split.
        mixed = None
        if spool is not None:
            mixed = stack.enter_context(writer(train_prefix))
            stack.callback(remove_shards, spool)
        splits = {}
        for name, number in SPLITS.items():
            prefix = Path(f"{settings.prefix}-{name}")
            place = spool if spool is not None and name == "train" else prefix
            splits[number] = stack.enter_context(_Split(writer(place), prefix, text, place is spool))
        for source in sources:
            assert source.plan is not None
            digest = source.digest()
            source.check_unchanged()
            for name, number in SPLITS.items():
                splits[number].begin(source, digest, source.plan.available[name])
            refused: list[str] = []
            for results in _results(source, weights, pool):
                for number, tokenized in results.items():
                    splits[number].add(tokenized)
                    refused += tokenized.bad
                done = [(len(one.lengths) + one.skipped.total() - one.more, len(one.ids)) for one in results.values()]
                progress.done(sum(n for n, _ in done), sum(n for _, n in done))
            warn_skipped(refused, len(refused), source.name)
        train = splits[SPLITS["train"]]
        if not train.accepted:
            raise DataError(_nothing_left(sources, train.tallies))
        portions: list[mixing.Portion] = []
        tallies: list[Tally] = []
        if mixed is not None and spool is not None:
            train.close()
            portions, tallies = _mix(settings, sources, train, spool, mixed)
        written = {
            name: Written(
                splits[number].tallies,
                (mixed if mixed is not None and name == "train" else splits[number].writer).finish(),
                *((portions, tallies) if name == "train" else ([], [])),
            )
            for name, number in SPLITS.items()
            if splits[number].accepted
        }
        manifest_path(train_prefix).unlink(missing_ok=True)  # of an older run, whose other files are replaced
        beside(written)
    return written


@contextlib.contextmanager
def _writable(prefix: Path) -> Iterator[None]:
    """Convert disk errors to a DataError with the path. Input errors are found before, in the first pass."""
    try:
        yield
    except OSError as error:
        raise DataError(
            f"{prefix}: cannot be written ({error.strerror or error}), no shards were written; free disk space, or choose another output"
        ) from error


def clean(prefix: Path) -> None:
    """Remove and log the files of a killed run: temporary files, and shards whose training split was not finished."""
    ours = rf"{re.escape(prefix.name)}-(?:train|val|spool).*|special_tokens\.json"
    pattern = re.compile(rf"\.+(?:{ours})\.tmp-(\d+)")  # two dots: a temporary file of a spool
    left = [
        path
        for path in (prefix.parent.glob(".*.tmp-*") if prefix.parent.is_dir() else ())
        if (match := pattern.match(path.name)) and not _is_alive(int(match[1]))
    ]
    if not manifest_path(f"{prefix}-train").exists():
        names = [f"{prefix}-{split}{ending}" for split in SPLITS for ending in ("-manifest.json", *ENDINGS)]
        left += [path for name in names if (path := Path(name)).exists()]
    for path in left:
        path.unlink(missing_ok=True)
    if left:
        log.info(
            "an earlier run was interrupted: removed its %d unfinished files, this run starts from the beginning",
            len(left),
        )


def _is_alive(process: int) -> bool:
    try:
        os.kill(process, 0)
    except ProcessLookupError:
        return False
    except PermissionError:
        return True
    return True


def _results(source: Source, weights: list[float], pool: Pool) -> Iterator[dict[int, Tokenized]]:
    """Yield the selected samples of every chunk: as they are held, or read again and tokenized."""
    to_read = [encodings is None for encodings in source.held]
    again = pool.map("tokenize", _tasks(source, weights, to_read)) if any(to_read) else iter(())
    for wanted in _wanted(source):
        encodings = source.held.popleft()
        if (wanted & 3).any():
            yield next(again) if encodings is None else encodings.divide(wanted & 3)
    yield from again  # nothing: it compares the file's end with the first reading's


def _tasks(source: Source, weights: list[float], to_read: list[bool]) -> Iterator[tuple[Any, ...]]:
    """Yield every chunk that is to be read and has selected samples, and the assignment of its samples."""
    all_wanted = zip(_wanted(source), to_read, strict=True)
    for chunk in source.chunks():
        if (found := next(all_wanted, None)) is None:
            raise DataError(f"{chunk.name}: the file grew while it was read; start again when it is complete")
        wanted, read = found
        if read and (wanted & 3).any():
            yield source.job, chunk, wanted, weights
    if next(all_wanted, None) is not None:
        raise DataError(f"{source.path}: the file became shorter while it was read; start again when it is complete")


def _wanted(source: Source) -> Iterator[np.ndarray]:
    """Yield the assignment of each chunk's samples."""
    assert source.plan is not None
    start = 0
    for count in source.per_chunk:
        yield source.plan.split[start : start + count]
        start += count


class _Split:
    """The train or val split while it is written; a context manager that writes nothing if no sample was accepted.

    keep: record the sizes of samples, for mixing.
    """

    def __init__(self, writer: ShardWriter, prefix: Path, text: str | None, keep: bool):
        self.writer, self._keep = writer, keep
        self._text_path = None if text is None else Path(f"{prefix}{text}")
        self.tallies: list[Tally] = []
        self.sizes: list[list[tuple[np.ndarray, np.ndarray]]] = []
        self.digests: list[str] = []

    @property
    def accepted(self) -> int:
        return total(self.tallies).accepted

    def begin(self, source: Source, digest: str, available: int) -> None:
        """Begin the samples of a source."""
        self.writer.source(source.label, str(source.path), digest)
        self.tallies.append(Tally(source.name, available, weights=self.writer.manifest.weights))
        self.sizes.append([])
        self.digests.append(digest)

    def add(self, samples: Tokenized) -> None:
        """Write samples; count them and the skipped ones."""
        self.tallies[-1].available += samples.more
        self.tallies[-1].skip(samples.skipped, samples.skipped_tokens)
        assistant = self.tallies[-1].accept(samples.lengths, samples.roles)
        if self._keep:
            self.sizes[-1].append((samples.lengths.astype(np.int32), assistant.astype(np.int32)))
        self.writer.add_many(samples.ids, samples.role_bytes, samples.lengths)
        if self._text is not None:
            self._text.write(samples.text)

    def close(self) -> None:
        """Finish the files before the block ends."""
        self.__exit__(None, None, None)

    def __enter__(self) -> "_Split":
        with contextlib.ExitStack() as stack:
            stack.enter_context(self.writer)
            self._text = None if self._text_path is None else stack.enter_context(_text_file(self._text_path))
            self._stack = stack.pop_all()
        return self

    def __exit__(self, *error: Any) -> None:
        if error[0] is None and not self.accepted:
            error = (_Nothing, _Nothing(), None)  # open files remove their temporary files, as after a failure
        self._stack.__exit__(*error)


class _Nothing(Exception):
    """Makes open files remove their temporary files; does not leave this module."""


def _mix(
    settings: Settings, sources: list[Source], train: _Split, spool: Path, writer: ShardWriter
) -> tuple[list[mixing.Portion], list[Tally]]:
    """Copy the samples of the mix from the spooled training split, and count them."""
    assert settings.mix_by is not None
    units = []
    for parts in train.sizes:
        lengths = np.concatenate(
            [np.empty(0, np.int32), *(part[settings.mix_by == "assistant_tokens"] for part in parts)]
        )
        units.append(np.ones_like(lengths) if settings.mix_by == "samples" else lengths)
    portions = mixing.select(
        [source.name for source in sources],
        units,
        [source.split.share or 0 for source in sources],
        settings.mix_total,
        settings.mix_max_epochs,
        [source.random(settings.rng_seed, "mix") for source in sources],
    )
    shards, first, tallies = open_shards(spool), 0, []
    for source, digest, portion, own in zip(sources, train.digests, portions, units, strict=True):
        writer.source(source.label, str(source.path), digest)
        tallies.append(Tally(source.name, len(own), weights=writer.manifest.weights))
        writer.copy(shards, portion.picks + first, partial(_accept, tallies[-1]))
        first += len(own)
    return portions, tallies


def _accept(tally: Tally, role_bytes: np.ndarray, lengths: np.ndarray) -> None:
    tally.accept(lengths, count_roles(role_bytes, lengths))


@contextlib.contextmanager
def _text_file(path: Path) -> Iterator[IO[bytes]]:
    with atomic_file(path) as file:
        if path.suffix != ".gz":
            yield file
            return
        # No name and no time in the archive: the same chats give the same bytes.
        with gzip.GzipFile(filename="", mode="wb", fileobj=file, mtime=0) as packed:
            yield cast(IO[bytes], packed)


def _nothing_left(sources: list[Source], tallies: list[Tally]) -> str:
    reasons = sum((source.left_out for source in sources), total(tallies).skipped)
    listed = (
        ", ".join(f"{reason}: {count}" for reason, count in sorted(reasons.items())) or "the files contain no chats"
    )
    paths = ", ".join(str(source.path) for source in sources)
    return f"{paths}: no training sample is left ({listed}); check the settings"
