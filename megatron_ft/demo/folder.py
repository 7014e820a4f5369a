"""The demo's run folder. One demo uses it at a time, and an earlier demo is deleted only after the new one has finished.

Only a folder that a demo has made (it contains MARKER) is moved or deleted.
"""

import contextlib
import shutil
from collections.abc import Iterator
from pathlib import Path

from megatron_ft.errors import ConfigError
from megatron_ft.steps.lock import held

MARKER = ".megatron_ft_demo"
SUMMARY = "summary.json"  # written last: a folder that contains it is a finished demo


@contextlib.contextmanager
def fresh_run_folder(folder: Path) -> Iterator[None]:
    """Provide an empty `folder` for the block. A finished demo in it is moved to FOLDER.previous and deleted at the end.

    If the block does not write SUMMARY (it was stopped), FOLDER.previous is kept.
    Raise ConfigError if the folder contains other files, or a demo that is still running.
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
        raise ConfigError(f"--run_dir: {folder} is not a plain folder; choose another one")
    if folder.is_dir() and any(folder.iterdir()) and not (folder / MARKER).exists():
        raise ConfigError(f"--run_dir: {folder} contains files that are not a demo's; choose another folder")


def _lock(folder: Path) -> contextlib.AbstractContextManager[None]:
    return held(
        folder / MARKER, f"--run_dir: another demo is running in {folder}; wait until it ends, or choose another folder"
    )


def _remove(folder: Path) -> None:
    if folder.is_dir():
        shutil.rmtree(folder)
