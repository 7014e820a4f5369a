"""Answers of the model while it is trained, and their file beside metrics.jsonl."""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

COLUMNS = ("prompt", "answer", "reference", "right")


@dataclass(frozen=True)
class Sample:
    """An answer. messages: the conversation that it continues. reference: the answer to compare with; None: there is none."""

    messages: list[dict[str, str]]
    answer: str
    reference: str | None = None

    @property
    def right(self) -> bool | None:
        """Return whether the answer is the reference, spaces around them aside; None without a reference."""
        return None if self.reference is None else self.answer.strip() == self.reference.strip()

    def cells(self) -> list[Any]:
        """Return the values of COLUMNS."""
        prompt = "\n".join(f"{message['role']}: {message['content']}" for message in self.messages)
        return [prompt, self.answer, self.reference, self.right]

    def entry(self) -> dict[str, Any]:
        """Return what samples.jsonl has of it."""
        compared = {} if self.reference is None else {"reference": self.reference, "right": self.right}
        return {"messages": self.messages, "answer": self.answer, **compared}

    def markdown(self) -> str:
        """Return prompt, answer and reference as blocks of code, which Markdown shows as they are."""
        named = zip(COLUMNS[:3], self.cells(), strict=False)
        return "\n\n".join(f"{name}\n\n{_block(text)}" for name, text in named if text is not None)


Sampler = Callable[[], Sequence[Sample]]
"""Answers all prompts. All ranks call it together, and all of the last pipeline stage get the answers."""


def _block(text: str) -> str:
    return "\n".join(f"    {line}" for line in text.splitlines() or [""])


def summary(samples: Sequence[Sample]) -> str:
    """Return how many answers there are, and how many of those with a reference are right."""
    compared = [sample.right for sample in samples if sample.right is not None]
    right = f", {sum(compared)} of {len(compared)} right" if compared else ""
    return f"{len(samples)} prompt{'s' if len(samples) != 1 else ''}{right}"


def line(iteration: int, sample: Sample) -> str:
    """Return a line of samples.jsonl."""
    return json.dumps({"iteration": iteration, **sample.entry()}, ensure_ascii=False) + "\n"
