"""Answers that end at given strings, also where a string begins and ends within tokens."""

from collections.abc import Callable, Sequence

_MARGIN = 8  # tokens that add no text: special ones, parts of characters


class StopStrings:
    """Cuts answers before the first of the strings. decode: ids to text, with special tokens as text."""

    def __init__(self, strings: Sequence[str], decode: Callable[[Sequence[int]], str]):
        self.strings, self.decode = list(strings), decode
        self.reach = max(len(text.encode()) for text in strings) + _MARGIN

    def is_over(self, ids: list[int]) -> bool:
        """Say if one of the strings is in the text of the last tokens. A longer answer was asked about at each of its tokens."""
        return self._first(self.decode(ids[-self.reach :])) is not None

    def cut(self, text: str) -> str:
        """Return a text up to the first of the strings."""
        return text[: self._first(text)]

    def _first(self, text: str) -> int | None:
        found = [at for at in (text.find(one) for one in self.strings) if at >= 0]
        return min(found, default=None)
