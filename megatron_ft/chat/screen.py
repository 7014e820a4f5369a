"""What the terminal shows: answers on standard output, notes on standard error, colours only in a terminal."""

from __future__ import annotations

import os
import sys
from collections.abc import Sequence

_BOLD, _FAINT, _PLAIN = "\033[1m", "\033[2m", "\033[0m"


class Screen:
    """names: of the models; with more than one each answer has the name above it. is_terminal: a person reads it."""

    def __init__(self, names: Sequence[str], is_terminal: bool):
        self._names, self._is_terminal = names, is_terminal
        self._colours = is_terminal and not os.environ.get("NO_COLOR")

    def begin(self, model: int) -> None:
        """Begin an answer."""
        if len(self._names) > 1:
            print(self._in(_BOLD, f"[{self._names[model]}]"))

    def show(self, text: str) -> None:
        print(text, end="", flush=True)

    def end(self) -> None:
        """End an answer."""
        print("\n" if self._is_terminal or len(self._names) > 1 else "", flush=True)

    def note(self, text: str) -> None:
        sys.stdout.flush()
        print(self._in(_FAINT, text), file=sys.stderr, flush=True)

    def _in(self, style: str, text: str) -> str:
        return f"{style}{text}{_PLAIN}" if self._colours else text
