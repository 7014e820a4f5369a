"""Answers of the model while it is trained, and their file beside metrics.jsonl."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from megatron_ft.wording import counted

SAMPLES = "samples.jsonl"
COLUMNS = ("prompt", "answer", "reference", "right")


@dataclass(frozen=True)
class Sample:
    """An answer. messages: the conversation that it continues. reference: the answer to show beside it; None: there is none.
    judged: whether an answer is right if it is the reference."""

    messages: list[dict[str, str]]
    answer: str
    reference: str | None = None
    judged: bool = True

    def answered(self, answer: str) -> Sample:
        """Return it with an answer."""
        return dataclasses.replace(self, answer=answer)

    @property
    def right(self) -> bool | None:
        """Return whether the answer is the reference, spaces around them aside; None where this is not judged."""
        if self.reference is None or not self.judged:
            return None
        return self.answer.strip() == self.reference.strip()

    def cells(self) -> list[Any]:
        """Return the values of COLUMNS."""
        prompt = "\n".join(f"{message['role']}: {message['content']}" for message in self.messages)
        return [prompt, self.answer, self.reference, self.right]

    def entry(self) -> dict[str, Any]:
        """Return what samples.jsonl has of it."""
        beside = {"reference": self.reference, "right": self.right}
        known = {name: value for name, value in beside.items() if value is not None}
        return {"messages": self.messages, "answer": self.answer, **known}

    def markdown(self) -> str:
        """Return prompt, answer and reference as blocks of code, which Markdown shows as they are."""
        named = zip(COLUMNS[:3], self.cells(), strict=False)
        return "\n\n".join(f"{name}\n\n{_block(text)}" for name, text in named if text is not None)


Sampler = Callable[[], Sequence[Sample]]
"""Answers all prompts. All ranks call it together, and all of the last pipeline stage get the answers."""


def earlier(folder: Path | None) -> Iterator[tuple[int, Sample]]:
    """Yield the answers of a run's earlier starts, with their iterations. Lines that cannot be read are left out."""
    path = folder / SAMPLES if folder else None
    for text in path.read_text(encoding="utf-8").splitlines() if path and path.is_file() else ():
        try:
            entry = json.loads(text)
            yield (
                int(entry["iteration"]),
                Sample(entry["messages"], entry["answer"], entry.get("reference"), "right" in entry),
            )
        except (ValueError, KeyError, TypeError):
            continue


def _block(text: str) -> str:
    return "\n".join(f"    {line}" for line in text.splitlines() or [""])


def summary(samples: Sequence[Sample]) -> str:
    """Return how many answers there are, and how many of those with a reference are right."""
    compared = [sample.right for sample in samples if sample.right is not None]
    right = f", {sum(compared)} of {len(compared)} right" if compared else ""
    return f"{counted(len(samples), 'prompt')}{right}"


def line(iteration: int, sample: Sample) -> str:
    """Return a line of samples.jsonl."""
    return json.dumps({"iteration": iteration, **sample.entry()}, ensure_ascii=False) + "\n"
