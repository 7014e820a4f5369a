"""Scores of answers, 1.0 or 0.0, as the tasks' authors score them: pure functions of an answer and what was expected.

LongEval asks another model whether a topic is right. Here a topic is scored as an answer from documents is, so that no service is needed.
"""

import re
import string
from collections.abc import Sequence

_ARTICLES = re.compile(r"\b(a|an|the)\b")
_PUNCTUATION = str.maketrans("", "", string.punctuation)


def holds_value(answer: str, expected: Sequence[str]) -> float:
    """Score key-value retrieval: the value occurs in the answer, in upper or lower case (Lost in the Middle).

    It must stand alone, so that a value of two or three digits is not found in longer ones by chance.
    """
    return float(any(re.search(rf"(?<![^\W_]){re.escape(value)}(?![^\W_])", answer, re.I) for value in expected))


def last_number(answer: str, expected: Sequence[str]) -> float:
    """Score line retrieval: the last number in the answer is the line's (LongEval)."""
    numbers = re.findall(r"\d+", answer)
    return float(bool(numbers) and int(numbers[-1]) in {int(number) for number in expected})


def best_subspan(answer: str, expected: Sequence[str]) -> float:
    """Score documents and topics: an expected text occurs in the answer's first line, both normalised (best subspan exact match).

    Later lines do not count, because a model could copy the prompt, which contains the expected text (Lost in the Middle).
    """
    first = normalised(answer.strip().split("\n")[0])
    return float(any(text and text in first for text in map(normalised, expected)))


def normalised(text: str) -> str:
    """Return a text in lower case, without punctuation, articles and repeated spaces, as SQuAD compares answers."""
    return " ".join(_ARTICLES.sub(" ", text.lower().translate(_PUNCTUATION)).split())
