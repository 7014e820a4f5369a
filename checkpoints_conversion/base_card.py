"""What the model card of a base says that a model trained from it has to say too: licence and languages."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import yaml

CARRIED = ("license", "license_name", "license_link", "language")
_FENCE = "---"
_MOST = 1 << 16  # characters of the entries, of one of them, and languages
_LONGEST, _LANGUAGES = 300, 400


def carried_entries(folder: Path) -> dict[str, Any] | None:
    """Return the entries of README.md in a model's folder; None without any. What cannot be read is left out: a card is not the model."""
    try:
        with (folder / "README.md").open(encoding="utf-8-sig") as file:
            text = file.read(_MOST)
    except (OSError, UnicodeDecodeError):
        return None
    found = front_matter(text)
    entries = {name: _plain(found[name]) for name in CARRIED if name in found}
    return {name: value for name, value in entries.items() if value} or None


def front_matter(text: str) -> dict[str, Any]:
    """Return the YAML entries between the first two lines of dashes; {} without them."""
    lines = text.splitlines()
    if not lines or lines[0].strip() != _FENCE:
        return {}
    end = next((i for i, line in enumerate(lines[1:], 1) if line.strip() == _FENCE), None)
    if end is None:
        return {}
    try:
        found = yaml.load("\n".join(lines[1:end]), Loader=_Texts)
    except (yaml.YAMLError, ValueError, RecursionError):
        return {}
    return found if isinstance(found, dict) else {}


class _Texts(yaml.BaseLoader):
    """Reads every value as text: the language `no` is Norwegian, not False."""


def _plain(value: Any) -> str | list[str] | None:
    """Return a text or a list of texts; None for anything else."""
    if isinstance(value, str):
        return value.strip()[:_LONGEST] or None
    if isinstance(value, list):
        return [one[:_LONGEST] for one in value[:_LANGUAGES] if isinstance(one, str) and one.strip()] or None
    return None
