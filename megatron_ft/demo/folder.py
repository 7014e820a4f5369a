"""The demo's run folder: taken by one demo at a time, and an earlier demo's only given up once there is a new one.

Only a folder that a demo made (it holds MARKER) is ever moved or deleted.
"""

import contextlib
import fcntl
import shutil
from collections.abc import Iterator
from pathlib import Path

from megatron_ft.errors import ConfigError

MARKER = ".megatron_ft_demo"
SUMMARY = "summary.json"  # written last: a folder with it is a finished demo's


@contextlib.contextmanager
def fresh_run_folder(folder: Path) -> Iterator[None]:
    """An empty `folder` for the block. A finished demo in it waits in FOLDER.previous and is deleted at the end.

    If the block does not write SUMMARY (it was stopped), the previous demo stays where it is.
    Raises ConfigError when the folder holds something else, or a demo that is still running.
    """
    previous = folder.with_name(folder.name + ".previous")
    _refuse_strange(folder)
    _refuse_strange(previous)
    if folder.is_dir() and any(folder.iterdir()):
        with _lock(folder):
            if (folder / SUMMARY).exists():
                _remove(previous)
                folder.rename(previous)
            else:
                _remove(folder)
    folder.mkdir(parents=True, exist_ok=True)
    with _lock(folder):
        yield
    if (folder / SUMMARY).exists():
        _remove(previous)


def _refuse_strange(folder: Path) -> None:
    if folder.is_symlink() or (folder.exists() and not folder.is_dir()):
        raise ConfigError(f"--run_dir: {folder} is not a plain folder: choose another")
    if folder.is_dir() and any(folder.iterdir()) and not (folder / MARKER).exists():
        raise ConfigError(f"--run_dir: {folder} holds something else than a demo, and stays as it is: choose another")


@contextlib.contextmanager
def _lock(folder: Path) -> Iterator[None]:
    with open(folder / MARKER, "a") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise ConfigError(f"--run_dir: a demo is running in {folder}: wait for it, or choose another") from None
        except OSError:
            pass  # a file system without locks
        yield


def _remove(folder: Path) -> None:
    if folder.is_dir():
        shutil.rmtree(folder)
