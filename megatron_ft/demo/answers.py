"""The model's answers to the held-out questions, read from the output file of `megatron-ft generate`."""

import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

MAX_NEW_TOKENS = 24  # the longest right answer has about half of them


@dataclass(frozen=True)
class Answer:
    """One question, the expected answer and the model's answer."""

    topic: str
    question: str
    expected: str
    text: str

    @property
    def right(self) -> bool:
        """Return True if the answer is exactly the expected one, without surrounding spaces."""
        return self.text == self.expected


def read_answers(path: Path) -> list[Answer]:
    with path.open(encoding="utf-8") as file:
        lines = [json.loads(line) for line in file]
    return [
        Answer(line["topic"], line["messages"][-1]["content"], line["expected"], line["answer"].strip())
        for line in lines
    ]


def exact_match(answers: Sequence[Answer]) -> float:
    """Return the share of right answers, 0 to 1."""
    return sum(answer.right for answer in answers) / len(answers)
