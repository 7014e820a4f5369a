"""The folder of a run of tune: what it was begun with, so that the same command goes on and another one is refused."""

from __future__ import annotations

import contextlib
import shutil
from pathlib import Path
from typing import Any

from megatron_ft.errors import ConfigError, UserError
from megatron_ft.files import read_json, write_json
from megatron_ft.steps.lock import held

RECORD, LOG = "tune.json", "tune.log"
_FORMAT = 1


def begun_with(folder: Path) -> dict[str, Any] | None:
    """Return what a folder was begun with; None for a new one. Raise ConfigError if it holds other files."""
    if not folder.exists() or (folder.is_dir() and not any(folder.iterdir())):
        return None
    try:
        found = read_json(folder / RECORD)
        return dict(found["settings"])
    except (OSError, UserError, KeyError, TypeError, ValueError):
        raise ConfigError(f"-o {folder}: contains files that are not tune's; choose another folder") from None


def check_same(folder: Path, before: dict[str, Any], now: dict[str, Any]) -> None:
    """Raise ConfigError if a run was begun with other settings."""
    for name in dict.fromkeys([*before, *now]):
        if before.get(name) != now.get(name):
            was, to = (_shown(settings.get(name)) for settings in (before, now))
            what = f"the model's files have changed since {folder} was begun"
            if name != "identity":
                what = f"{folder} was begun with {name} {was}, now it is {to}"
            raise ConfigError(f"{what}: give the same, another folder (-o), or --overwrite to begin anew")


def _shown(value: Any) -> str:
    if isinstance(value, float):
        return f"{value:g}"
    return "not given" if value is None else " ".join(map(str, value)) if isinstance(value, list) else str(value)


def record(folder: Path, settings: dict[str, Any]) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    write_json(folder / RECORD, {"format_version": _FORMAT, "settings": settings})


def clear(folder: Path) -> None:
    """Remove a folder that tune has made."""
    shutil.rmtree(folder, ignore_errors=True)


def locked(folder: Path) -> contextlib.AbstractContextManager[None]:
    """Hold the folder. Raise ConfigError while another tune uses it."""
    return held(
        folder / LOG, f"-o {folder}: another tune is running in it; wait until it ends, or choose another folder"
    )
