"""An answer and how it ended."""

from dataclasses import dataclass


@dataclass(frozen=True)
class Answer:
    """full: it ended at the limit of its length. halted: the user ended it."""

    text: str
    tokens: int
    full: bool
    halted: bool
