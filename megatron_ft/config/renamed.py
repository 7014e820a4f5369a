"""Flags and YAML keys of earlier versions. They still work, and print one line with the new name."""

from __future__ import annotations

from collections.abc import Container

from megatron_ft.log import logger

RENAMED = {
    "digests": "verify_checkpoint",
    "no_digests": "no_verify_checkpoint",
    "verify": "verify_data",
    "no_verify": "no_verify_data",
    "quick": "no_verify_data",
}
"""Name of before -> name of now, where a command knows the new name and not the old one."""


def current(name: str, known: Container[str], prefix: str = "") -> str:
    """Return the present name of a setting. prefix: "--" for flags, nothing for YAML keys; for the line that is printed."""
    new = RENAMED.get(name)
    if name in known or new is None or new not in known:
        return name
    logger("config").warning(f"{prefix}{name} is now {prefix}{new}; the old name still works")
    return new
