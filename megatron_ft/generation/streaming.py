"""The text of an answer that grows token by token. What was shown never changes: no half characters, no beginnings of stop strings."""

from __future__ import annotations

from collections.abc import Collection, Sequence

from megatron_ft.data.tokenizer import Tokenizer

_UNFINISHED = "\ufffd"
"""What a decoder writes for bytes that are no whole character yet."""


class TextStream:
    """Says what can be shown of an answer. White space around it and what may become a stop string are held back."""

    def __init__(self, tokenizer: Tokenizer, stop: Sequence[str] = ()):
        self._tokenizer, self._stop = tokenizer, stop
        self._shown = ""

    def more(self, ids: Sequence[int]) -> str:
        """Return the text to show after what was returned before. ids: of the answer so far."""
        text = self._tokenizer.decode(ids, skip_special=True).rstrip(_UNFINISHED)
        if self._stop:
            whole = self._tokenizer.decode(ids)
            text = without_end(text, begun(whole.rstrip(_UNFINISHED), self._stop), self._tokenizer.special_tokens)
        return self._up_to(text.strip())

    def rest(self, answer: str) -> str:
        """Return what is left to show of the whole answer; all of it on a new line if the decoder changed what was shown."""
        more = self._up_to(answer)
        return more if self._shown == answer else f"\n{answer}"

    def _up_to(self, text: str) -> str:
        if not text.startswith(self._shown):
            return ""
        more, self._shown = text[len(self._shown) :], text
        return more


def begun(text: str, stop: Sequence[str]) -> str:
    """Return the longest end of a text that one of the strings contains or begins with; "" if there is none."""
    found = [one for one in stop if one in text]
    if found:
        return text[min(text.find(one) for one in found) :]
    ends = (
        text[-size:] for one in stop for size in range(min(len(one), len(text)), 0, -1) if text.endswith(one[:size])
    )
    return max(ends, key=len, default="")


def without_end(text: str, end: str, special: Collection[str]) -> str:
    """Return a text without its end, from which special tokens are removed first, as they are not in the text."""
    for token in special:
        end = end.replace(token, "")
    return text.removesuffix(end) if end else text
