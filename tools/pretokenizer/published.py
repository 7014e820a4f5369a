"""What Open-Assistant's pretokenizer leaves out of the published datasets: refusals, blanks, citation marks. Data and pure functions.

Source: model/model_training/custom_datasets of LAION-AI/Open-Assistant. Its numbers on small inputs are compared in
tests/pretokenizer/test_original.py.
"""

import re
from collections import Counter
from dataclasses import dataclass
from typing import Any

# Its 36 phrases in lower case, in which it compares them, without those that contain another one.
PHRASES = (
    "as a language model",
    "as a large language model",
    "as an ai ",
    "an ai language model you don't have",
    "ai language model and i do not",
    "i'm an ai ",
    "i am an ai ",
    "as your dedicated ai language model",
    "as a hypothetical ai",
    "as a neutral ai",
    "my knowledge cutoff",
    "my knowledge cut off",
    "as a machine",
    "i cannot assist",
    "i do not have personal preferences",
    "i don't have personal preferences",
    "unfortunately, i cannot provide",
    "i'm sorry, i cannot",
    "ai cannot create or program",
    "i'm afraid i cannot create",
    "openai",
)
_CITATIONS = (re.compile(r"\[\d+(?:,\s*\d+)*\]"), re.compile(r"\[citation needed\]"), re.compile(r"\[[a-zA-Z]\]"))


@dataclass(frozen=True)
class PublishedOptions:
    """Selection of records as Open-Assistant's pretokenizer does it."""

    drop_refusals: bool = True
    """Leave out records whose question or answer has one of Open-Assistant's phrases of refusals; with --input: false."""
    drop_blank: bool = True
    """Leave out records whose question or answer is missing or blank; with --input: false."""

    def leaves_out(self, texts: tuple[object, ...], left_out: Counter[str], spaces_are_blank: bool = True) -> bool:
        """Return True, and count the reason, for a record with these texts."""
        if self.drop_blank and any(_is_blank(text, spaces_are_blank) for text in texts):
            left_out["blank question or answer"] += 1
            return True
        if self.drop_refusals and any(refuses(text) for text in texts if isinstance(text, str)):
            left_out["refusal phrase"] += 1
            return True
        return False


UNPUBLISHED: dict[str, Any] = {"drop_refusals": False, "drop_blank": False, "val_rounding": "down"}
"""Defaults for files that are given as such: nobody has published counts of them."""


def refuses(text: str) -> bool:
    """Return True for a text with one of the phrases."""
    lower = text.lower()
    return any(phrase in lower for phrase in PHRASES)


def without_citations(text: str) -> str:
    """Return the text without [2, 3], [1234], [citation needed], [a]. [Citation Needed] and [ 4 ] remain, as in the original."""
    for pattern in _CITATIONS:
        text = pattern.sub("", text)
    return text


def _is_blank(text: object, spaces_are_blank: bool) -> bool:
    return text is None or (isinstance(text, str) and not (text.strip() if spaces_are_blank else text))
