"""What has been chosen so far, with the reasons."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any


@dataclass
class Choice:
    """flags: of finetune, by name. reasons: (what, value, why), in the order in which they were chosen. steps: of the run."""

    flags: dict[str, Any] = field(default_factory=dict)
    reasons: list[tuple[str, str, str]] = field(default_factory=list)
    steps: int = 0

    def take(self, given: Mapping[str, Any], name: str, value: Any, why: str) -> Any:
        """Set a flag: to what the user has given, else to `value`. Return it."""
        if name in given:
            value, why = given[name], "as given"
        self.flags[name] = value
        self.reasons.append((name, str(value), why))
        return value
