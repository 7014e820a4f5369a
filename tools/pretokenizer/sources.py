"""The datasets of a run: their files, their readers, and the assignment of their samples."""

import dataclasses
import itertools
from collections import Counter, deque
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from megatron_ft import files
from megatron_ft.data.tokenizer_files import fingerprint
from megatron_ft.errors import ConfigError, DataError
from tools.pretokenizer import places
from tools.pretokenizer.chunk import Chunk
from tools.pretokenizer.dolphin_mix import MixOptions, joined
from tools.pretokenizer.encode import Encodings
from tools.pretokenizer.filled import FillOptions, filled
from tools.pretokenizer.lines import chunks, parse
from tools.pretokenizer.named import INSTRUCTIONS
from tools.pretokenizer.oasst_flat import is_flat, trees
from tools.pretokenizer.readers import Reader, get_reader
from tools.pretokenizer.sampling import MARK, Plan, SplitOptions
from tools.pretokenizer.selection import Selection
from tools.pretokenizer.settings import Settings, build
from tools.pretokenizer.work import Job

MOST_LABELS = 32  # datasets of one name that are told apart
_CUSTOM = "not a key here; read the file as `- custom: {keys: {question: KEY, answer: KEY}, input_file_path: FILE}`"
REPLACED = {
    "instruction_column": _CUSTOM,
    "response_column": _CUSTOM,
    "dataset_path": "not a key here; give the file or folder as input_file_path",
    "data_path": "not a key here; give the folder as cache_dir of the section, or the file as input_file_path",
    "no_cache": "not a key here, nothing is downloaded; remove it",
    "mode": "not a key here, all chats are for supervised training; remove it",
}
"""Keys of Open-Assistant's loaders that have another form here."""


@dataclass
class Source:
    """One dataset. number: index among datasets of the same name, from 0. label: its name in the manifest. left_out: number of records
    left out, by reason. unread: keys that the reader does not know, with their numbers.

    plan, per_chunk (samples of each chunk) and held (its samples, if they are encoded already) are set by the first pass.
    """

    name: str
    number: int
    path: Path
    files: list[Path]
    reader: Reader
    split: SplitOptions
    job: Job
    label: str
    left_out: Counter[str] = field(default_factory=Counter)
    bad: list[str] = field(default_factory=list)
    unread: Counter[str] = field(default_factory=Counter)
    plan: Plan | None = None
    per_chunk: list[int] = field(default_factory=list)
    held: deque[Encodings | None] = field(default_factory=deque)
    stamps: list[tuple[int, int]] = field(default_factory=list)

    @property
    def marked(self) -> float:
        """The share of the samples whose prompts are marked for language-modelling loss."""
        return self.reader.marked if self.split.marked_prompts is None else self.split.marked_prompts

    @property
    def takes_all(self) -> bool:
        """Whether all samples are used as they are: none is sampled, none marked."""
        return self.split.size is None and self.split.fraction in (None, 1) and not self.marked

    @property
    def bytes(self) -> int:
        return sum(path.stat().st_size for path in self.files)

    def stamp(self) -> None:
        """Note the sizes and times of its files, before they are read for the first time."""
        self.stamps = self._stamps()

    def check_unchanged(self) -> None:
        """Raise DataError if a file is another than when it was stamped: its digest would not be that of what was read."""
        for path, before, now in zip(self.files, self.stamps, self._stamps(), strict=True):
            if before != now:
                raise DataError(f"{path}: the file changed while it was read; start again when it is complete")

    def _stamps(self) -> list[tuple[int, int]]:
        found = [path.stat() for path in self.files]
        return [(one.st_size, one.st_mtime_ns) for one in found]

    def chunks(self) -> Iterator[Chunk]:
        """Yield the chunks of its files, the same in every pass."""
        options = self.job.options
        if isinstance(options, MixOptions):
            return joined(self._chunks, options, self.unread)
        if isinstance(options, FillOptions) and options.fill_min_length is not None:
            columns = INSTRUCTIONS[self.reader.name]
            return filled(self._chunks, (columns.question, columns.answer), options, self.unread)
        return self._chunks()

    def _chunks(self) -> Iterator[Chunk]:
        for path in self.files:
            found = chunks(path)
            if self.reader.name == "oasst_export" and (first := next(found, None)) is not None:
                found = itertools.chain([first], found)
                _, record = next(parse(first, []), ("", {}))
                found = trees(found) if is_flat(record) else found
            yield from found

    def random(self, seed: int, purpose: str = "") -> np.random.Generator:
        """Return a generator seeded with the seed (or the dataset's manual_seed), the dataset's name and its number, so that other
        datasets do not change its random choices."""
        own = int(fingerprint([self.name, self.number]).removeprefix("xxh3:"), 16)
        seed = seed if self.split.manual_seed is None else self.split.manual_seed
        return np.random.default_rng([seed, own, *purpose.encode()])

    def mark(self, seed: int) -> None:
        """Choose the samples whose prompts are marked for language-modelling loss."""
        assert self.plan is not None
        if self.marked >= 1:
            self.plan.split[:] |= MARK
        elif self.marked > 0:
            self.plan.split[self.random(seed, "mark").random(len(self.plan.split)) < self.marked] |= MARK

    def digest(self) -> str:
        """Return a hash of its file, or of the names and hashes of its files."""
        if self.files == [self.path]:
            return files.digest(self.path)
        names = [path.relative_to(self.path).as_posix() for path in self.files]
        return fingerprint([names, [files.digest(path) for path in self.files]])


def make_sources(settings: Settings) -> list[Source]:
    """Return the configured datasets. Raise ConfigError for unknown keys, DataError for a missing file."""
    seen: Counter[str] = Counter()
    sources = []
    for name, keys in settings.datasets:
        sources.append(_source(name, seen[name], keys, settings))
        seen[name] += 1
    _label(sources)
    return sources


def _label(sources: list[Source]) -> None:
    """Tell datasets of the same name apart, by the ends of their paths: `messages:critiques`. Training shows the loss by these names.
    Of more than MOST_LABELS, which are the parts of one dataset, all keep the name."""
    for name, count in Counter(source.name for source in sources).items():
        same = [source for source in sources if source.name == name]
        paths = [_parts(source.path) for source in same]
        if 1 < count <= MOST_LABELS:
            for source, own in zip(same, paths, strict=True):
                end = next((n for n in range(1, len(own)) if sum(path[-n:] == own[-n:] for path in paths) == 1), 1)
                again = paths.count(own) > 1
                source.label = f"{name}:{'/'.join(own[-end:])}" + (f".{source.number + 1}" if again else "")


def _parts(path: Path) -> tuple[str, ...]:
    """Return the parts of a path, the last without a file's endings."""
    parts = path.absolute().parts
    return (*parts[:-1], parts[-1] if path.is_dir() else parts[-1].split(".")[0] or parts[-1])


def _source(name: str, number: int, keys: dict[str, Any], settings: Settings) -> Source:
    reader, keys = get_reader(name), {key: value for key, value in keys.items() if value is not None}
    given, splits = keys.pop("input_file_path", None), keys.pop("split", None)
    repositories = (str(keys.pop("hf_dataset_name", "")),) if keys.get("hf_dataset_name") else reader.repositories
    data_files, splits = keys.pop("data_files", None), splits or ("train" if given else reader.splits)
    where = f"dataset {name}"
    theirs = {f.name for f in dataclasses.fields(reader.options)}
    if "lang" in keys and "lang" not in theirs:  # not a key of this reader: compared with the record's language
        keys["languages"] = keys.pop("lang")
    ours = {f.name for f in dataclasses.fields(SplitOptions)}
    select = {f.name for f in dataclasses.fields(Selection)}
    unknown = {key: value for key, value in keys.items() if key not in ours | theirs | select}
    if unknown:
        for key in unknown.keys() & REPLACED.keys():
            raise ConfigError(f"{where}: {key}: {REPLACED[key]}")
        known = (ours | theirs | select | {"input_file_path", "split", "lang", "data_files", "hf_dataset_name"}) - {
            "languages"
        }
        build(dataclasses.make_dataclass("Known", [(key, Any, None) for key in sorted(known)]), unknown, where)
    defaults = {"max_val_set": settings.eval_size, "val_rounding": reader.val_rounding}
    split = build(SplitOptions, defaults | _only(keys, ours), where)
    split.check(name)
    if settings.mix_by and split.share is None:
        raise ConfigError(f"{where}: share is not set, but mix_by is {settings.mix_by}; set the share of each dataset")
    options = build(reader.options, _only(keys, theirs), where)
    common = {key: getattr(settings, key) for key in select if getattr(settings, key, None) is not None}
    selection = build(Selection, common | _only(keys, select), where)
    selection.check(where)
    path = places.find(None if given is None else str(given), name, settings.cache_dir, repositories)
    wanted = getattr(options, "languages", []) if reader.name == "dolly15k_multilingual" else []
    chosen = places.files_of(path, [*wanted] or [part.strip() for part in str(splits).split(",")])
    chosen = places.named_files(path, data_files, reader.data_files) or chosen
    return Source(name, number, path, chosen, reader, split, Job(name, reader.name, options, selection), name)


def _only(keys: dict[str, Any], names: set[str]) -> dict[str, Any]:
    return {key: value for key, value in keys.items() if key in names}
