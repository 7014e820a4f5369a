"""Run the six commands with their progress on the screen, and show the answers before and after."""

from __future__ import annotations

import json
import math
import shlex
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from megatron_ft.report import read_metrics
from megatron_ft.steps.screen import Screen, shortened, sparkline, wrapped
from megatron_ft.steps.shell import Shell
from megatron_ft.tune.choice import Choice
from megatron_ft.tune.six import Places, Step

SHOWN, WIDTH = 3, 76
"""Questions whose answers are printed; characters of an answer."""


def show_choice(screen: Screen, saw: Mapping[str, object], reasons: Sequence[tuple[str, str, str]]) -> None:
    """Print what was seen, and what was chosen and why, one line each."""
    for i, (what, fact) in enumerate(saw.items()):
        screen.line(f"  {'saw' if i == 0 else '':8}{what:10}{fact}")
    grouped: list[tuple[str, str]] = []
    for name, value, why in reasons:
        one = f"{name} {value}"
        if grouped and grouped[-1][1] == why:
            grouped[-1] = (f"{grouped[-1][0]}, {one}", why)
        else:
            grouped.append((one, why))
    for i, (chosen, why) in enumerate(grouped):
        screen.line(f"  {'chose' if i == 0 else '':8}{chosen}" + (f": {why}" if why else ""))
    screen.line()


def as_script(saw: Mapping[str, object], reasons: Sequence[tuple[str, str, str]], steps: Sequence[Step]) -> str:
    """Return the commands as lines for a shell, what was chosen as comments."""
    lines = [f"# {what}: {fact}" for what, fact in saw.items()]
    lines += [f"# {name} {value}" + (f": {why}" if why else "") for name, value, why in reasons]
    return "\n".join([*lines, *(shlex.join(step.words) for step in steps)])


def show_looked(screen: Screen, step: Step, output: str) -> None:
    """Print the first step, which has been run to look at the chats."""
    _begin(screen, step)
    screen.done("finished before" if "already made" in output else _result(step, output))


def _begin(screen: Screen, step: Step) -> None:
    screen.step(step.title)
    for line in wrapped(step.words):
        screen.note(line)


def run_steps(screen: Screen, shell: Shell, steps: Sequence[Step], places: Places, choice: Choice) -> None:
    """Run the commands whose results do not exist yet. Raise CommandFailed if one fails."""
    for step in steps:
        _begin(screen, step)
        if step.result.exists():
            screen.done("finished before")
        elif step.title == "train":
            _train(screen, shell, step, places, choice)
        else:
            screen.done(_result(step, shell.run(step.words)))


def _train(screen: Screen, shell: Shell, step: Step, places: Places, choice: Choice) -> None:
    file, every = places.folder / "metrics.jsonl", max(1, choice.steps // 6)
    try:
        shell.run(step.words, lambda: screen.progress(read_metrics(file), choice.steps, every))
    finally:
        screen.stop_progress()
    metrics = read_metrics(file)
    losses, held_out = metrics.values("train/loss"), metrics.values("eval/loss")
    curve = sparkline([math.log(loss) for loss in losses if loss > 0])
    ends = dict.fromkeys(f"{loss:.3f}" for loss in (held_out[:1] + held_out[-1:]))
    validation = f"   held-out chats {' to '.join(ends)}" if ends else ""
    screen.done(f"loss {losses[0]:.2f} {curve} {losses[-1]:.4f}{validation}" if losses else "no step was left to do")


def _result(step: Step, output: str) -> str:
    """Return the line of a command's output that says what it did."""
    lines = [line.strip() for line in output.splitlines()]
    for mark in ("parameters, ", "train: "):
        if found := next((line for line in lines if mark in line), None):
            return shortened(found.split(" -> ")[0].removeprefix("train: "), 78)
    return f"answers in {step.result}"


def read_lines(path: Path) -> list[dict[str, Any]]:
    with path.open(encoding="utf-8") as file:
        return [json.loads(line) for line in file]


def show_answers(screen: Screen, places: Places) -> None:
    """Print the first held-out questions with the answers before and after training, and what the chats say."""
    asked = read_lines(Path(places.prompts))
    before, after = (read_lines(Path(places[f"{when}.jsonl"])) for when in ("before", "after"))
    screen.line("\n  on chats that were not trained on", "bold")
    for question, old, new in list(zip(asked, before, after, strict=True))[:SHOWN]:
        screen.line(f"  {shortened(question['messages'][-1]['content'], WIDTH + 10)}", "bold")
        for label, text in (("before", old["answer"]), ("after", new["answer"]), ("the chat", question["answer"])):
            screen.line(f"    {label:10}{shortened(text, WIDTH) or '(nothing)'}")
    same = sum(new["answer"].strip() == one["answer"].strip() for one, new in zip(asked, after, strict=True))
    screen.line(f"  {same} of {len(asked)} answers are word for word those of the chats\n")
