"""The datasets of a run: where each lies, how it is read, and which of its samples go where."""

import dataclasses
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from megatron_ft import files
from megatron_ft.data.tokenizer_files import fingerprint
from megatron_ft.errors import ConfigError, DataError
from tools.pretokenizer.lines import records
from tools.pretokenizer.readers import Conversation, Reader, get_reader
from tools.pretokenizer.sampling import OUT, Plan, SplitOptions, plan
from tools.pretokenizer.settings import Settings, build


@dataclass
class Source:
    """One dataset. left_out: what its reader did not take, by reason (filled by make_plan)."""

    name: str
    path: Path
    reader: Reader
    options: Any
    split: SplitOptions
    left_out: Counter[str] = field(default_factory=Counter)

    def groups(self, left_out: Counter[str]) -> Iterator[list[Conversation]]:
        """The conversations of each record, in the order of the file."""
        for where, record in records(self.path):
            yield self.reader.convert(record, where, self.options, left_out)

    def make_plan(self, rng: np.random.Generator) -> Plan:
        """Read the file once to count it, which finds every fault in it before anything is written."""
        self.left_out.clear()
        sizes = np.fromiter((len(group) for group in self.groups(self.left_out)), np.int64)
        return plan(sizes, self.split, rng)

    def chosen(self, split: np.ndarray) -> Iterator[tuple[int, Conversation]]:
        """(TRAIN or VAL, conversation) of the samples that are not left out. split: uint8 [samples], from make_plan."""
        samples = (sample for group in self.groups(Counter()) for sample in group)
        for number, sample in zip(split.tolist(), samples, strict=True):
            if number != OUT:
                yield number, sample

    def digest(self) -> str:
        return files.digest(self.path)


def make_sources(settings: Settings) -> list[Source]:
    """The datasets as configured. Raises ConfigError for keys no one knows, DataError for a file that is missing."""
    return [_source(name, keys, settings) for name, keys in settings.datasets]


def make_plans(sources: list[Source], seed: int) -> list[Plan]:
    """A plan for each source. A dataset's choices depend on the seed, its name and how many of that name came before,
    so that adding another dataset changes nothing for it."""
    seen: Counter[str] = Counter()
    plans = []
    for source in sources:
        own = int(fingerprint([source.name, seen[source.name]]).removeprefix("xxh3:"), 16)
        seen[source.name] += 1
        plans.append(source.make_plan(np.random.default_rng([seed, own])))
    return plans


def _source(name: str, keys: dict[str, Any], settings: Settings) -> Source:
    reader, keys = get_reader(name), {key: value for key, value in keys.items() if value is not None}
    if (given := keys.pop("input_file_path", None)) is None:
        raise ConfigError(f"dataset {name}: no input_file_path; say where its file lies")
    ours = {f.name for f in dataclasses.fields(SplitOptions)}
    theirs = {f.name for f in dataclasses.fields(reader.options)}
    unknown = {key: value for key, value in keys.items() if key not in ours | theirs}
    if unknown:
        build(
            dataclasses.make_dataclass("Known", [(key, Any, None) for key in ours | theirs]), unknown, f"dataset {name}"
        )
    common = {"max_val_set": settings.eval_size, **{key: value for key, value in keys.items() if key in ours}}
    split = build(SplitOptions, common, f"dataset {name}")
    split.check(name)
    options = build(reader.options, {key: value for key, value in keys.items() if key in theirs}, f"dataset {name}")
    return Source(name, _find(str(given), settings.cache_dir), reader, options, split)


def _find(given: str, cache_dir: str | None) -> Path:
    """A file as given, or in the cache folder."""
    places = [Path(given).expanduser(), Path(cache_dir or ".") / given]
    for path in places:
        if path.is_file():
            return path
    raise DataError(
        f"{given}: no such file (looked for {places[0].absolute()} and in {cache_dir or '.'}); check the path"
    )
