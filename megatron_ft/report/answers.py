"""The answers of a model before, while and after it is trained, from samples.jsonl: what still differs comes first."""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from html import escape
from pathlib import Path
from typing import Any

from megatron_ft.errors import DataError
from megatron_ft.report.page import Html, badge, table
from megatron_ft.wording import counted

SAMPLES = "samples.jsonl"
NOTE = (
    "Greedy answers before training, during it and at the last step: to the prompts of --sample_prompts, else to some chats of the "
    "validation or training data. Where answers are compared with a reference, those that differ from it at the end come first."
)
_SHOWN = 100  # prompts

Answers = dict[int, dict[str, Any]]  # iteration -> line of the file


def read_answers(path: Path) -> list[Answers]:
    """Return the answers to each prompt, in the file's order; [] without the file. Of a repeated iteration the later line counts.

    Raise DataError with file and line. An incomplete last line (the run is still writing) is left out.
    """
    found: dict[str, Answers] = {}
    lines = path.read_text(encoding="utf-8").splitlines() if path.is_file() else []
    for number, line in enumerate(lines, 1):
        try:
            entry = json.loads(line)
            key = json.dumps([entry["messages"], entry.get("reference")])
            found.setdefault(key, {})[int(entry["iteration"])] = entry | {"answer": str(entry["answer"])}
        except (ValueError, KeyError, AttributeError, TypeError) as error:
            if number == len(lines):
                break
            raise DataError(f"{path}, line {number}: not a line of samples ({error}); remove it") from error
    return list(found.values())


def answers(prompts: Sequence[Answers]) -> Iterator[str]:
    """Yield the section: how many were their references at each iteration, and a table of prompts by iterations."""
    steps = sorted({at for one in prompts for at in one})
    if counts := list(_counts(prompts, steps)):
        yield table(
            ("", *(f"step {at:,}" for at, _ in counts)), [("same as the reference", *(text for _, text in counts))]
        )
    shown = _spread(steps)
    order = sorted(prompts, key=_is_right)
    rows = [(_prompt(one), *(_cell(one.get(at)) for at in shown), _reference(one)) for one in order[:_SHOWN]]
    yield table(("prompt", *(f"step {at:,}" for at in shown), "reference"), rows)
    if len(order) > _SHOWN:
        yield f'<p class="below">and {counted(len(order) - _SHOWN, "more prompt")} in {SAMPLES}</p>'
    elif len(steps) > len(shown):
        yield f'<p class="below">The answers at all {len(steps)} steps are in {SAMPLES}.</p>'


def _spread(steps: list[int]) -> list[int]:
    """Return the first step, the one in the middle, and the last."""
    return sorted({steps[0], steps[len(steps) // 2], steps[-1]})


def _counts(prompts: Sequence[Answers], steps: list[int]) -> Iterator[tuple[int, str]]:
    for at in steps:
        compared = [one[at]["right"] for one in prompts if at in one and "right" in one[at]]
        if compared:
            yield at, f"{sum(compared)} of {len(compared)}"


def _last(one: Answers) -> dict[str, Any]:
    return one[max(one)]


def _is_right(one: Answers) -> int:
    """Return the order of prompts: 0 differs at the end, 1 without a reference, 2 the same."""
    right = _last(one).get("right")
    return 1 if right is None else 2 if right else 0


def _prompt(one: Answers) -> Html:
    messages = _last(one)["messages"]
    return Html("<br>".join(escape(str(message.get("content", ""))) for message in messages))


def _cell(entry: dict[str, Any] | None) -> Html:
    if entry is None:
        return Html("")
    return Html(f"{_compared(entry)}{escape(entry['answer'])}")


def _compared(entry: dict[str, Any]) -> str:
    """Return whether the answer is word for word the reference: another one is not wrong for that."""
    if "right" not in entry:
        return ""
    return f"{badge(True, 'same')} " if entry["right"] else '<span class="soft">differs</span> '


def _reference(one: Answers) -> str:
    return _last(one).get("reference") or ""
