"""megatron-ft merge: several shards into one, for instance those of the tasks of a SLURM array.

Samples keep their order: all of the first shards, then all of the second. What does not belong together (another
tokenizer, another chat format, the same file twice) is refused before anything is written. Samples with the same tokens and roles
may be dropped over all parts, since the tasks could not know of each other's.
"""

import sys
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import numpy as np

from megatron_ft import __version__, files
from megatron_ft.config.cli import Command, run_script
from megatron_ft.data.manifest import check_tokenizer, manifest_path
from megatron_ft.data.roles import weight_table
from megatron_ft.data.shards import Shards, ShardWriter, open_shards
from megatron_ft.data.verify import verify_shards
from megatron_ft.errors import ConfigError, DataError, UserError
from megatron_ft.log import logger
from tools.pretokenizer.duplicates import first_of_each
from tools.pretokenizer.finished import ENDING as SETTINGS_ENDING


@dataclass
class Merge:
    """What to merge"""

    prefixes: list[str] = field(default_factory=list, metadata={"required": True})
    """prefixes of the shards, in the order of their samples"""
    output: str = field(default="", metadata={"required": True})
    """prefix of the merged shards"""
    overwrite: bool = False
    """replace finished shards that are there already"""
    allow_repeats: bool = False
    """merge although a source file occurs in several of the shards"""
    duplicates: Literal["keep", "exact"] = "keep"
    """exact: of samples with the same tokens and roles keep the first"""
    without: list[str] = field(default_factory=list)
    """prefixes of shards whose samples are left out, by tokens and roles: the validation set, that it stays unseen"""
    verify_data: bool = True
    """compare all parts with their hashes first; --no_verify_data skips this"""


COMMAND = Command(
    name="merge",
    summary="several shards into one, after checking that they belong together",
    sections=(Merge,),
    examples=("megatron-ft merge --prefixes parts/0-train parts/1-train parts/2-train --output data/all-train",),
)
log = logger("merge")


def run(options: Merge) -> int:
    """Raises UserError for shards that do not belong together, or are damaged."""
    if options.output in options.prefixes:
        raise ConfigError(f"--output {options.output} is one of the prefixes; give another")
    if manifest_path(options.output).exists() and not options.overwrite:
        if not _same_as_before(options):
            raise DataError(
                f"{manifest_path(options.output)}: exists already; add --overwrite, or choose another --output"
            )
        print(f"{options.output}: made of the same shards with the same settings, and whole; nothing to do")
        return 0
    parts = [open_shards(prefix) for prefix in options.prefixes]
    for other in parts[1:]:
        check_alike(parts[0], other)
    if not options.allow_repeats:
        check_repeats(parts)
    others = [open_shards(prefix) for prefix in options.without]
    for other in others:
        check_alike(parts[0], other)
    if options.verify_data:
        verify_shards([*parts, *others], "--no_verify_data")
    kept, dropped = chosen(parts, others, options.duplicates == "exact")
    first, asked = parts[0].manifest, _asked(options)
    _settings_file(options).unlink(missing_ok=True)  # an earlier run's: it says nothing of what is written now
    weights = weight_table(sorted({weight for part in parts for weight in part.manifest.weights}))
    with ShardWriter(options.output, parts[0].vocab_size, first.tokenizer, first.chat_format, weights) as writer:
        for part, keep in zip(parts, kept, strict=True):
            for source in part.manifest.sources or [{"name": "unknown", "file": part.prefix, "digest": ""}]:
                writer.source(source["name"], source["file"], source["digest"])
                start, end = source.get("documents", (0, len(part)))
                _copy(writer, part, start, end, keep)
        files.write_json(_settings_file(options), asked)  # before the manifest, which makes the shards finished ones
    counts = writer.manifest.counts
    print(f"{len(parts)} shards, {counts['samples']:,} samples, {counts['tokens']:,} tokens -> {options.output}")
    if options.without or options.duplicates != "keep":
        print("dropped: " + ", ".join(f"{count:,} {reason}" for reason, count in dropped.items()))
    return 0


def _settings_file(options: Merge) -> Path:
    return Path(f"{options.output}{SETTINGS_ENDING}")


def _asked(options: Merge) -> dict[str, Any]:
    """What the result depends on: settings, and the parts by their manifests, which hold the hashes of all their files."""
    keys = ("prefixes", "without", "duplicates", "allow_repeats")
    parts = [files.digest(manifest_path(prefix)) for prefix in (*options.prefixes, *options.without)]
    return {"megatron_ft": __version__, "settings": {key: getattr(options, key) for key in keys}, "manifests": parts}


def _same_as_before(options: Merge) -> bool:
    """Whether the finished shards there are what this run would write: a job that is started again has nothing to do."""
    try:
        same = files.read_json(_settings_file(options)) == _asked(options)
    except (UserError, OSError):
        return False
    if same:
        merged = open_shards(options.output)
        if options.verify_data:
            verify_shards([merged], "--no_verify_data")
    return same


def check_alike(one: Shards, other: Shards) -> None:
    """Raise DataError unless a token and a turn mean the same in both."""
    check_tokenizer(one.manifest, other.manifest.tokenizer, other.vocab_size, where=one.prefix)
    check_tokenizer(other.manifest, one.manifest.tokenizer, one.vocab_size, where=other.prefix)
    if one.manifest.chat_format != other.manifest.chat_format:
        raise DataError(
            f"{other.prefix}: chat format {_name(other.manifest.chat_format)}, {one.prefix} has "
            f"{_name(one.manifest.chat_format)}; pretokenize both with the same --chat_format"
        )


def check_repeats(parts: list[Shards]) -> None:
    """Raise DataError where the same input, by its hash, is in two of the shards under the same name."""
    seen: dict[tuple[str, str], str] = {}
    for part in parts:
        for key in {(source["file"], source["digest"]) for source in part.manifest.sources}:
            if key in seen and key[1]:
                raise DataError(
                    f"{part.prefix}: {key[0]} is in {seen[key]} too, its samples would count twice; leave one out, "
                    "or add --allow_repeats (parts of one file are meant)"
                )
            seen[key] = part.prefix


def chosen(parts: list[Shards], others: list[Shards], once: bool) -> tuple[list[np.ndarray], dict[str, int]]:
    """Which samples of each part are kept, bool [samples] each, and how many are not, by reason. Takes 8 bytes a sample, and reads every
    sample where there is something to compare."""
    whole = sum(map(len, parts))
    keep, dropped = np.ones(whole, bool), {"duplicates": 0, "in --without": 0}
    if once or others:
        hashes = np.concatenate([_hashes(part) for part in parts])
        if others:
            keep = ~np.isin(hashes, np.concatenate([_hashes(other) for other in others]))
            dropped["in --without"] = int((~keep).sum())
        if once:
            again = keep & ~first_of_each(hashes)
            dropped["duplicates"], keep = int(again.sum()), keep & ~again
    return np.split(keep, np.cumsum([len(part) for part in parts])[:-1]), dropped


def _hashes(shards: Shards) -> np.ndarray:
    """A hash of each sample's tokens and roles, marks and weights aside: uint64 [samples]."""
    import xxhash

    result = np.empty(len(shards), np.uint64)
    for sample in range(len(shards)):
        result[sample] = xxhash.xxh3_64_intdigest(shards.tokens(sample).tobytes() + shards.roles(sample).tobytes())
    return result


def _copy(writer: ShardWriter, part: Shards, start: int, end: int, keep: np.ndarray) -> None:
    for first in range(start, end, 100_000):
        last = min(first + 100_000, end)
        writer.copy(part, first + np.flatnonzero(keep[first:last]))


def _name(chat_format: dict[str, Any]) -> str:
    return chat_format.get("name") or chat_format.get("template") or "none"


if __name__ == "__main__":
    sys.exit(run_script(COMMAND, run))
