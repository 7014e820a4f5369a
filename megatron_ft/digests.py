"""A folder's digests.json: size and XXH3 (128 bits) of every file, which detects flipped bits, truncated and missing files.

The manifest is written last, under a temporary name, and renamed: if it exists, every file that it lists was complete. It also has a hash
of itself. It detects accidents, not manipulation: who can write to the folder can write the manifest. Used for checkpoints and exports.
"""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Iterable
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path, PurePosixPath
from typing import Any, NamedTuple

from megatron_ft.errors import DamagedError
from megatron_ft.files import digest, read_json, sync_all, write_json
from megatron_ft.shares import deal

MANIFEST = "digests.json"
FORMAT_VERSION = 1
_THREADS = min(8, os.cpu_count() or 1)  # hashing and reading leave the interpreter free


class Entry(NamedTuple):
    """The entry of one file in the manifest."""

    bytes: int
    digest: str
    """As files.digest gives it."""


def files_below(folder: Path) -> list[str]:
    """Return all regular files of a folder except the manifest: names relative to it, with slashes, sorted. Links are not followed."""
    names = []
    for where, _, here in os.walk(folder):
        names += [Path(where, name) for name in here if not Path(where, name).is_symlink()]
    return sorted(path.relative_to(folder).as_posix() for path in names if path != Path(folder) / MANIFEST)


def digest_files(folder: Path, names: Iterable[str]) -> dict[str, Entry]:
    """Return name -> size and digest for the files of one rank; write_manifest combines those of all ranks."""
    return _threaded(partial(_entry, Path(folder)), names)


def _entry(folder: Path, name: str) -> Entry:
    return Entry((folder / name).stat().st_size, digest(folder / name))


def write_manifest(folder: Path, entries: dict[str, Entry]) -> None:
    """Commit a folder: digests.json appears whole, once every file it names is on the disk."""
    sync_all(folder)
    listed = {name: entry._asdict() for name, entry in sorted(entries.items())}
    write_json(
        Path(folder) / MANIFEST, {"format_version": FORMAT_VERSION, "files": listed, "digest_of_files": _own(listed)}
    )


def write_digests(folder: Path) -> dict[str, Entry]:
    """Digest every file of a finished folder and commit it with its manifest. An existing manifest is replaced."""
    entries = digest_files(folder, files_below(folder))
    write_manifest(folder, entries)
    return entries


def has_digests(folder: Path) -> bool:
    return (Path(folder) / MANIFEST).is_file()


def read_digests(folder: Path) -> dict[str, Entry]:
    """Return name -> entry. Raise DamagedError if digests.json is missing or differs from what was written."""
    path = Path(folder) / MANIFEST
    if not path.is_file():
        raise DamagedError(f"{path} is missing: the folder was not finished; make it again, or use an earlier one")
    try:
        manifest = read_json(path)
        listed = manifest["files"]
        if manifest["format_version"] != FORMAT_VERSION or manifest["digest_of_files"] != _own(listed):
            raise ValueError("it is not what was written")
        entries = {name: Entry(**entry) for name, entry in listed.items()}
    except Exception as error:  # a damaged file can raise any exception
        raise DamagedError(f"{path} is damaged ({error}); restore it, or use an earlier one") from error
    if outside := [name for name in entries if _leaves(name)]:
        raise DamagedError(f"{path} names {outside[0]!r}, outside its own folder; do not trust this folder")
    return entries


def check_digests(folder: Path, share: tuple[int, int] = (0, 1), only: Iterable[str] | None = None) -> None:
    """Read every file again. Raises DamagedError naming the first that is missing, of another size, or of other content.

    share: (which, of how many): only that part of the files, about equal in bytes, for ranks that check together. only: of these
    files, those the manifest knows.
    """
    folder, entries = Path(folder), read_digests(folder)
    names = _dealt(entries, *share) if only is None else [name for name in only if name in entries]
    faults = _threaded(partial(_fault, folder, entries), names)
    found = [fault for fault in faults.values() if fault]
    if found:
        more = f" ({len(found)} files in all)" if len(found) > 1 else ""
        raise DamagedError(f"{found[0]}{more}; restore it, or use an earlier one")


def unlisted(folder: Path) -> list[str]:
    """Return the files in a committed folder that are not in its manifest: they were added later."""
    known = read_digests(folder)
    return [name for name in files_below(folder) if name not in known]


def _fault(folder: Path, entries: dict[str, Entry], name: str) -> str | None:
    path, wanted = folder / name, entries[name]
    try:
        if not path.is_file():
            return f"{path} is missing"
        size = path.stat().st_size
        if size != wanted.bytes:
            return f"{path} has {size} bytes, {wanted.bytes} were written: it is {'cut short' if size < wanted.bytes else 'damaged'}"
        if digest(path) == wanted.digest:
            return None
    except OSError as error:
        return f"{path} cannot be read ({error.strerror})"
    return f"{path} is damaged: its digest is not the one that was written"


def _dealt(entries: dict[str, Entry], which: int, of: int) -> list[str]:
    """Return one share of the names, of about equal size in bytes."""
    names = sorted(entries)
    owners = deal([entries[name].bytes + 1 for name in names], of)
    return [name for name, owner in zip(names, owners, strict=True) if owner == which]


def _threaded(work: Callable[[str], Any], names: Iterable[str]) -> dict[str, Any]:
    names = list(names)
    with ThreadPoolExecutor(_THREADS) as pool:
        return dict(zip(names, pool.map(work, names), strict=True))


def _own(listed: dict) -> str:
    import xxhash

    return f"xxh3:{xxhash.xxh3_128_hexdigest(json.dumps(listed, sort_keys=True).encode())}"


def _leaves(name: str) -> bool:
    return PurePosixPath(name).is_absolute() or ".." in PurePosixPath(name).parts
