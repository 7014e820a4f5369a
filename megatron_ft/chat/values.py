"""The values of the sampling that a chat can change: by their names, checked, in words."""

from __future__ import annotations

import math
from dataclasses import fields, replace
from typing import TYPE_CHECKING, Any

from megatron_ft.errors import ConfigError

if TYPE_CHECKING:
    from megatron_ft.chat.settings import Settings

NAMES: dict[str, tuple[type, float, float, str]] = {
    "temperature": (float, 0, 100, "a number from 0 (greedy) to 100"),
    "top_k": (int, 0, 10**9, "a whole number, 0 for all tokens"),
    "top_p": (float, 1e-9, 1, "a number above 0, at most 1"),
    "repetition_penalty": (float, 1e-9, 100, "a number above 0, 1 for none"),
    "max_new_tokens": (int, 1, 10**9, "a whole number of at least 1"),
    "seed": (int, 0, 2**63 - 1, "a whole number of at least 0"),
}
"""Name -> its type, its smallest and its largest value, what it is."""


def changed(settings: Settings, name: str = "", value: Any = "", *more: str) -> Settings:
    """Return settings with another value. Raise ConfigError for an unknown name, or a value out of range."""
    if name not in NAMES or more:
        raise ConfigError(
            f"/set {' '.join([name, str(value), *more]).strip()}: give one of {', '.join(NAMES)} and a value"
        )
    number = _number(name, value)
    if name in {field.name for field in fields(settings.sampling)}:
        return replace(settings, sampling=replace(settings.sampling, **{name: number}))
    return replace(settings, **{name: number})


def _number(name: str, value: Any) -> Any:
    kind, least, most, words = NAMES[name]
    try:
        number = kind(value)
    except (TypeError, ValueError, OverflowError):
        number = math.nan
    if isinstance(value, bool) or (isinstance(value, float) and number != value) or not least <= number <= most:
        raise ConfigError(f"{name} {str(value)[:40]}: give {words}")
    return number


def as_values(settings: Settings) -> dict[str, Any]:
    """Return all values by their names."""
    values = {**vars(settings.sampling), **vars(settings)}
    return {name: values[name] for name in NAMES}


def described(settings: Settings) -> str:
    """Return all values in one line."""
    return ", ".join(
        f"{name} {value:g}" if isinstance(value, float) else f"{name} {value}"
        for name, value in as_values(settings).items()
    )
