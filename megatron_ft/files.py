"""Writes files atomically, and reads files with errors that a user can act on.

New files and folders are made under a temporary name beside their target (same disk, so the rename is atomic), flushed to the disk, then
renamed. Temporary names start with a dot and contain ".tmp-", so what a killed process leaves is easy to recognise and is never taken for
a result. Checkpoints and shards are in other modules.
"""

import contextlib
import ctypes
import errno
import json
import os
import secrets
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import IO, Any

from megatron_ft.errors import UserError

_CHUNK = 8 << 20  # bytes hashed at a time


@contextlib.contextmanager
def naming(path: str | os.PathLike) -> Iterator[None]:
    """Add the name of the file to an OSError raised within: errors of write, flush and close do not contain it."""
    try:
        yield
    except OSError as error:
        error.filename = error.filename or str(path)
        raise


@contextlib.contextmanager
def atomic_file(path: str | os.PathLike, mode: str = "wb") -> Iterator[IO]:
    """Open a file for writing that appears under `path` only if the block ends without an error.

    path: replaced if it is there; missing parent folders are made.
    mode: "wb", or "w" for UTF-8 text with plain newlines.
    """
    target = Path(path)
    target.parent.mkdir(parents=True, exist_ok=True)
    temporary = temporary_name(target)
    text: dict[str, Any] = {} if "b" in mode else {"encoding": "utf-8", "newline": "\n"}
    try:
        with naming(target), open(temporary, mode.replace("w", "x"), **text) as file:
            yield file
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, target)
        _sync(target.parent)
    finally:
        temporary.unlink(missing_ok=True)


@contextlib.contextmanager
def atomic_folder(path: str | os.PathLike, overwrite: bool = False) -> Iterator[Path]:
    """Yield an empty folder that becomes `path` if the block ends without an error, and is removed otherwise.

    overwrite: replace `path`; the old folder is deleted after the new one is in its place.
    Raises UserError where `path` is a file or a folder with something in it and overwrite is False.
    """
    target = Path(path)
    if not overwrite:
        refuse_existing(target)
    target.parent.mkdir(parents=True, exist_ok=True)
    temporary = temporary_name(target)
    temporary.mkdir()
    try:
        yield temporary
        sync_all(temporary)
        _take_place(temporary, target, overwrite)
    finally:
        shutil.rmtree(temporary, ignore_errors=True)


def replace_folder(temporary: Path, target: Path, overwrite: bool = False) -> None:
    """Give a finished folder its name, once all of it is on the disk; as atomic_folder ends."""
    sync_all(temporary)
    _take_place(temporary, target, overwrite)


def refuse_existing(path: str | os.PathLike) -> None:
    """Raise UserError if something would be lost by writing a folder at `path`; an empty folder is fine."""
    target = Path(path)
    if target.is_dir():
        if any(target.iterdir()):
            raise UserError(f"{target} exists and is not empty: give another folder, or remove it first")
    elif target.exists() or target.is_symlink():
        raise UserError(f"{target} exists and is not a folder: give another folder, or remove it first")


def digest(path: str | os.PathLike) -> str:
    """Return the content of a file as "xxh3:<32 hex digits>" (XXH3, 128 bits: detects accidents, not manipulation)."""
    import xxhash

    state = xxhash.xxh3_128()
    with open(path, "rb") as file:
        while chunk := file.read(_CHUNK):
            state.update(chunk)
    return f"xxh3:{state.hexdigest()}"


def check_writable(flag: str, place: str | os.PathLike) -> str:
    """Return whether a folder exists, or where it will be created. Raise UserError with the flag if it cannot be written to."""
    place = Path(place)
    nearest = place
    try:
        nearest = next(folder for folder in (place, *place.absolute().parents) if os.path.lexists(folder))
        if nearest.exists() and not nearest.is_dir():
            raise NotADirectoryError(errno.ENOTDIR, "is not a folder")
        if any(len(os.fsencode(name)) > _LONGEST_NAME for name in place.parts):
            raise OSError(errno.ENAMETOOLONG, "a name of its path is too long")
        _try_to_write(nearest)
    except OSError as error:
        what = "is not a folder" if error.errno == errno.ENOTDIR else "cannot be written to"
        why = "" if error.errno in (errno.ENOTDIR, errno.EACCES) else f" ({(error.strerror or '').lower()})"
        raise UserError(f"{flag} {place}: {nearest} {what}{why}; choose another place, or change its rights") from None
    return "there, can be written to" if nearest == place else f"will be made in {nearest}"


def check_file_writable(flag: str, path: str | os.PathLike) -> None:
    """Raise UserError with the flag if a file cannot be written, because of its folder or because it is one."""
    if Path(path).is_dir():
        raise UserError(f"{flag} {path}: is a folder; give the name of a file")
    check_prefix_writable(flag, path)


def check_prefix_writable(flag: str, prefix: str | os.PathLike) -> None:
    """Raise UserError with the flag if files whose names begin so cannot be written."""
    check_writable(flag, Path(prefix).absolute().parent)


_LONGEST_NAME = 200
"""Bytes. File systems allow 255; the temporary name is longer than the final one."""
_NO_PLACES = ("/proc", "/sys", "/dev")
"""Of the system, not of users: a folder made in some of them is a command to the kernel, in others it lies in memory."""


def _try_to_write(folder: Path) -> None:
    """Raise OSError if nothing can be made in a folder. Rights alone do not tell: root has all, also where nothing can be written."""
    real = folder.resolve(strict=True)  # a link to nothing is no place either
    system = any(real.is_relative_to(place) for place in _NO_PLACES) and not real.is_relative_to("/dev/shm")
    if system:
        raise OSError(errno.EPERM, "a folder of the system")
    if not os.access(real, os.W_OK | os.X_OK):
        raise PermissionError(errno.EACCES, "no rights")
    trial = temporary_name(real / "trial")
    trial.mkdir()
    trial.rmdir()


def read_json(path: str | os.PathLike) -> Any:
    """Return the value in a JSON file. Raise UserError with the file, and the line if it is not valid JSON."""
    text = read_text(path)
    try:
        return json.loads(text)
    except json.JSONDecodeError as error:
        raise UserError(f"{path}, line {error.lineno}: not valid JSON ({error.msg}); is the file cut short?") from error
    except (RecursionError, ValueError) as error:  # lists in lists in lists, numbers of thousands of digits
        raise UserError(
            f"{path}: JSON that this project does not write ({str(error)[:80]}); restore the file"
        ) from error


def read_text(path: str | os.PathLike) -> str:
    """Return the text of a UTF-8 file, without a byte order mark. Raise UserError if it cannot be read."""
    try:
        return Path(path).read_text(encoding="utf-8-sig")
    except UnicodeDecodeError as error:
        raise UserError(f"{path}: byte {error.start} is not UTF-8; save the file as UTF-8") from error
    except OSError as error:
        raise UserError(f"{path}: cannot be read ({(error.strerror or str(error)).lower()}); check the path") from error


def write_json(path: str | os.PathLike, value: Any) -> None:
    """Write a value as indented JSON, whole or not at all; keys keep their order."""
    text = json.dumps(value, indent=2, ensure_ascii=False)  # before opening: a value that is not JSON creates no file
    with atomic_file(path, "w") as file:
        file.write(text + "\n")


def temporary_name(target: Path) -> Path:
    """Return a new name beside the target, under which it is written before it is renamed."""
    # Not tempfile: it makes files only their owner can read, and checkpoints are shared in a team.
    return target.with_name(f".{target.name}.tmp-{os.getpid()}-{secrets.token_hex(4)}")


def _take_place(temporary: Path, target: Path, overwrite: bool) -> None:
    if not overwrite:
        refuse_existing(target)  # again: another process may have finished meanwhile
    if not (target.exists() or target.is_symlink()):
        os.rename(temporary, target)
    elif target.is_dir() and not target.is_symlink() and not any(target.iterdir()):
        os.replace(temporary, target)
    else:
        old = temporary if _exchange(temporary, target) else _step_aside(temporary, target)
        _sync(target.parent)  # before anything of the old one is removed
        if old.is_dir() and not old.is_symlink():
            shutil.rmtree(old)
        else:
            old.unlink()
    _sync(target.parent)


_EXCHANGE = 2  # RENAME_EXCHANGE of Linux's renameat2
_HERE = -100  # AT_FDCWD: paths count from the working directory


def _exchange(one: Path, other: Path) -> bool:
    """Swap two names atomically, so that both exist after a kill at any time; return False if the system cannot."""
    try:
        swap = ctypes.CDLL(None, use_errno=True).renameat2
    except (AttributeError, OSError):
        return False
    return swap(_HERE, os.fsencode(one), _HERE, os.fsencode(other), _EXCHANGE) == 0


def _step_aside(temporary: Path, target: Path) -> Path:
    """Swap in two steps if the system cannot do it in one; return the new place of the old one."""
    old = temporary_name(target)
    os.rename(target, old)
    os.rename(temporary, target)
    return old


def sync_all(folder: Path) -> None:
    """Wait until every file below a folder, and the folders themselves, are on the disk."""
    for where, _, names in os.walk(folder):
        for name in names:
            _sync(Path(where, name))
        _sync(Path(where))


_UNSUPPORTED = {errno.EINVAL, errno.ENOTSUP, errno.ENOSYS, errno.EBADF, errno.EISDIR, errno.EACCES, errno.EPERM}
"""Errors of a file system that cannot flush a folder (or a file of another owner). A disk that fails returns EIO or ENOSPC."""


def _sync(path: Path) -> None:
    """Wait until a file, or a folder's list of names, is on the disk; skipped if the file system does not support it."""
    if path.is_symlink():
        return
    try:
        with naming(path):
            handle = os.open(path, os.O_RDONLY)
            try:
                os.fsync(handle)
            finally:
                os.close(handle)
    except OSError as error:
        if error.errno not in _UNSUPPORTED:
            raise
