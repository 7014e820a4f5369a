"""megatron-ft merge: join several shards into one, for instance those of the tasks of a SLURM array.

Samples keep their order: all of the first shards, then all of the second. Shards that do not match (other tokenizers or chat formats,
the same file twice) are refused before anything is written. Duplicates over all parts, by tokens and roles, can be removed: each task
could only find those in its own part.
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
from megatron_ft.wording import counted
from tools.pretokenizer.duplicates import first_of_each
from tools.pretokenizer.finished import ENDING as SETTINGS_ENDING


@dataclass
class Merge:
    """Input and output"""

    prefixes: list[str] = field(default_factory=list, metadata={"required": True})
    """prefixes of the shards to join, in the order of their samples"""
    output: str = field(default="", metadata={"required": True, "writes": "prefix"})
    """prefix of the merged shards"""
    overwrite: bool = False
    """replace finished shards of the same name"""
    allow_repeats: bool = False
    """allow the same source file in several of the shards, for parts of one file"""
    duplicates: Literal["keep", "exact"] = "keep"
    """samples with the same tokens and roles: keep all (keep), or only the first (exact)"""
    without: list[str] = field(default_factory=list)
    """prefixes of shards, such as the validation set, whose samples (by tokens and roles) are left out; default: none"""
    verify_data: bool = True
    """compare all shards with their hashes first; --no_verify_data skips this"""


COMMAND = Command(
    name="merge",
    summary="join several shards into one, after checking that they match",
    sections=(Merge,),
    examples=("megatron-ft merge --prefixes parts/0-train parts/1-train parts/2-train --output data/all-train",),
)
log = logger("merge")


def run(options: Merge) -> int:
    """Write the merged shards. Raise UserError for shards that do not match or are damaged."""
    if options.output in options.prefixes:
        raise ConfigError(f"--output {options.output} is also in --prefixes; choose another one")
    if manifest_path(options.output).exists() and not options.overwrite:
        if not _same_as_before(options):
            raise DataError(
                f"{manifest_path(options.output)}: exists already; add --overwrite, or choose another --output"
            )
        print(f"{options.output}: already made from the same shards with the same settings; nothing to do")
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
    selected, dropped = select(parts, others, options.duplicates == "exact")
    first, settings = parts[0].manifest, _settings(options)
    _settings_file(options).unlink(missing_ok=True)  # an earlier run's settings, which are no longer valid
    weights = weight_table(sorted({weight for part in parts for weight in part.manifest.weights}))
    with ShardWriter(options.output, parts[0].vocab_size, first.tokenizer, first.chat_format, weights, True) as writer:
        for part, keep in zip(parts, selected, strict=True):
            for source in part.manifest.sources or [{"name": "unknown", "file": part.prefix, "digest": ""}]:
                writer.source(source["name"], source["file"], source["digest"])
                start, end = source.get("documents", (0, len(part)))
                _copy(writer, part, start, end, keep)
        files.write_json(_settings_file(options), settings)  # before the manifest, which marks the shards as finished
    counts = writer.manifest.counts
    print(
        f"{counted(len(parts), 'shard')}, {counted(counts['samples'], 'sample')}, {counted(counts['tokens'], 'token')} -> {options.output}"
    )
    if options.without or options.duplicates != "keep":
        print("dropped: " + ", ".join(f"{count:,} {reason}" for reason, count in dropped.items()))
    return 0


def _settings_file(options: Merge) -> Path:
    return Path(f"{options.output}{SETTINGS_ENDING}")


def _settings(options: Merge) -> dict[str, Any]:
    """Return what the result depends on: settings, and hashes of the manifests, which contain the hashes of all files."""
    names = ("prefixes", "without", "duplicates", "allow_repeats")
    parts = [files.digest(manifest_path(prefix)) for prefix in (*options.prefixes, *options.without)]
    return {
        "megatron_ft": __version__,
        "settings": {name: getattr(options, name) for name in names},
        "manifests": parts,
    }


def _same_as_before(options: Merge) -> bool:
    """Return True if the finished shards are what this run would write; a restarted job then does nothing."""
    try:
        same = files.read_json(_settings_file(options)) == _settings(options)
    except (UserError, OSError):
        return False
    if same:
        merged = open_shards(options.output)
        if options.verify_data:
            verify_shards([merged], "--no_verify_data")
    return same


def check_alike(one: Shards, other: Shards) -> None:
    """Raise DataError unless both have the same tokenizer and chat format."""
    check_tokenizer(one.manifest, other.manifest.tokenizer, other.vocab_size, where=one.prefix)
    check_tokenizer(other.manifest, one.manifest.tokenizer, one.vocab_size, where=other.prefix)
    if one.manifest.chat_format != other.manifest.chat_format:
        raise DataError(
            f"{other.prefix}: chat format {_name(other.manifest.chat_format)}, {one.prefix} has "
            f"{_name(one.manifest.chat_format)}; pretokenize both with the same --chat_format"
        )


def check_repeats(parts: list[Shards]) -> None:
    """Raise DataError if the same input file, by name and hash, is in two of the shards."""
    seen: dict[tuple[str, str], str] = {}
    for part in parts:
        for key in {(source["file"], source["digest"]) for source in part.manifest.sources}:
            if key in seen and key[1]:
                raise DataError(
                    f"{part.prefix}: {key[0]} is also in {seen[key]}, so its samples would count twice; leave one out, "
                    "or add --allow_repeats if they are different parts of one file"
                )
            seen[key] = part.prefix


def select(parts: list[Shards], others: list[Shards], once: bool) -> tuple[list[np.ndarray], dict[str, int]]:
    """Return which samples of each part are kept, bool [samples] each, and the number of dropped ones by reason. Reads every sample
    and needs 8 bytes per sample if there is something to compare."""
    count = sum(map(len, parts))
    keep, dropped = np.ones(count, bool), {"duplicates": 0, "in --without": 0}
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
    """Return a hash of each sample's tokens and roles, without marks and weights: uint64 [samples]."""
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
