"""What is read from the file of another tool: our settings, and what became of each of its keys."""

from __future__ import annotations

import math
import re
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from megatron_ft.errors import ConfigError


@dataclass
class Dataset:
    """Data of a run. name: a file, a folder, or a name on the Hugging Face hub. pretokenize: flag -> value."""

    name: str
    local: bool
    pretokenize: dict[str, Any] = field(default_factory=dict)


@dataclass
class Job:
    """A training job of another tool.

    tool: its name. prefix: "--" where its keys are flags. finetune, convert, pretokenize: flag of our command -> value, True for a switch,
    a list for several values. adapters: None for all parameters. sharded: what splits the weights over all GPUs there.
    """

    tool: str
    prefix: str = ""
    model: str = ""
    finetune: dict[str, Any] = field(default_factory=dict)
    convert: dict[str, Any] = field(default_factory=dict)
    pretokenize: dict[str, Any] = field(default_factory=dict)
    datasets: list[Dataset] = field(default_factory=list)
    gpus: int | None = None
    nodes: int = 1
    adapters: bool = False
    micro_batch: int = 1
    accumulation: int = 1
    sharded: str = ""
    steps: int | None = None
    epochs: float | None = None
    warmup: float | None = None
    """Below 1: a share of all steps; else steps."""
    taken: list[tuple[str, str]] = field(default_factory=list)
    ignored: dict[str, list[str]] = field(default_factory=dict)
    impossible: list[tuple[str, str]] = field(default_factory=list)
    before: list[str] = field(default_factory=list)
    """What the user has to do or to decide before the commands run."""
    unfit: str = ""
    """Why there is nothing here that does this job; "": there is."""
    defaults: frozenset[str] = frozenset()
    """Keys that are not in the file, with the tool's default."""

    def shown(self, key: str, value: Any) -> str:
        """Return a key with its value as that tool writes it."""
        text = " ".join(map(str, value)) if isinstance(value, list) and self.prefix else plain(value)
        named = f"{self.prefix}{key} {text}".rstrip() if self.prefix else f"{key}: {text}"
        return f"{named} (its default)" if key in self.defaults else named

    def take(self, key: str, value: Any, ours: str) -> None:
        self.taken.append((self.shown(key, value), ours))

    def set(self, key: str, value: Any, flag: str, ours: Any) -> None:
        """Take a key as one flag of finetune."""
        self.finetune[flag] = ours
        self.take(key, value, flag_text(flag, ours))

    def ignore(self, key: str, value: Any, why: str) -> None:
        named = self.prefix + key if isinstance(value, dict) or value in (None, "", []) else self.shown(key, value)
        self.ignored.setdefault(why, []).append(named)

    def refuse(self, key: str, value: Any, why: str) -> None:
        nested = isinstance(value, dict) or (
            isinstance(value, list) and any(isinstance(one, dict | list) for one in value)
        )
        shown = f"{self.prefix}{key}" if nested else self.shown(key, value)
        self.impossible.append((shown, why))


def plain(value: Any) -> str:
    """Return a value as YAML would show it, in one short line."""
    if isinstance(value, bool):
        return str(value).lower()
    text = " ".join(str("" if value is None else value).split())
    return text if len(text) <= 60 else text[:57] + "..."


def flag_text(flag: str, value: Any) -> str:
    """Return a setting as it is written on our command line."""
    if isinstance(value, bool):
        return f"--{flag}" if value else f"--no_{flag}"
    return f"--{flag} {' '.join(map(str, value)) if isinstance(value, list) else written(value)}"


def written(value: Any) -> str:
    """Return a number without a needless `.0`, and other values as text."""
    return f"{value:.10g}" if isinstance(value, float) else str(value)


def is_off(value: Any) -> bool:
    """Return whether a value says that something is not used."""
    return value in (None, "", False, "none", "None", "no", "false") or value in ([], {})


def number(key: str, value: Any) -> float:
    """Return the number that a value is. Raise ConfigError."""
    try:
        if isinstance(value, bool):
            raise ValueError
        if not math.isfinite(found := float(value)):
            raise ValueError
        return found
    except (TypeError, ValueError, OverflowError):
        raise ConfigError(f"{key}: {plain(value)!r} is not a number") from None


def whole(key: str, value: Any) -> int:
    """Return the whole number that a value is. Raise ConfigError."""
    found = number(key, value)
    if found != int(found):
        raise ConfigError(f"{key}: {plain(value)!r} is not a whole number")
    return int(found)


def truth(key: str, value: Any) -> bool:
    """Return the truth that a value says; None and "" are false. Raise ConfigError."""
    if isinstance(value, bool) or value is None:
        return bool(value)
    text = str(value).lower()
    if text in ("true", "yes", "1", "on", "auto"):
        return True
    if text in ("false", "no", "0", "off", "", "none"):
        return False
    raise ConfigError(f"{key}: {plain(value)!r} is not true or false")


def is_local(name: str) -> bool:
    """Return whether a model or a dataset is a path, not a name on the Hugging Face hub."""
    return Path(name).exists() or name.startswith(("/", "./", "../", "~")) or not re.fullmatch(r"[\w.-]+/[\w.-]+", name)


def slug(name: str) -> str:
    """Return the last part of a name, for names of our own files."""
    return re.sub(r"[^\w.-]+", "-", Path(name.rstrip("/")).name).strip("-.") or "data"
