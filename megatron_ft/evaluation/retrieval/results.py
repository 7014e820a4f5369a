"""Scores of answers, put together: by length and depth, by task, and one number for each model. Pure functions."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence
from statistics import fmean
from typing import Any, Literal

from megatron_ft.errors import DataError

Normalisation = Literal["best", "range", "none"]
"""How scores of a subtask (one task at one length) are made comparable; see `normalised`."""


def summary(rows: Iterable[Mapping[str, Any]]) -> dict[str, Any]:
    """Return {task: {length: {"score", "prompts", "tokens", "depths": {depth: score}}}} of answers.

    rows: answers with "task", "length", "depth", "score" and "tokens". Lengths and depths are text, as JSON writes keys.
    """
    found: dict[str, dict[int, list[Mapping[str, Any]]]] = defaultdict(lambda: defaultdict(list))
    for row in rows:
        found[row["task"]][row["length"]].append(row)
    return {
        task: {str(length): _cell(by_length[length]) for length in sorted(by_length)}
        for task, by_length in found.items()
    }


def _cell(rows: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    depths = sorted({row["depth"] for row in rows})
    return {
        "score": fmean(row["score"] for row in rows),
        "prompts": len(rows),
        "tokens": fmean(row["tokens"] for row in rows),
        "depths": {f"{depth:g}": fmean(row["score"] for row in rows if row["depth"] == depth) for depth in depths},
    }


def subtasks(tasks: Mapping[str, Mapping[str, Any]]) -> dict[tuple[str, int], float]:
    """Return the score of each task at each length."""
    return {(task, int(length)): cell["score"] for task, cells in tasks.items() for length, cell in cells.items()}


def normalised(scores: Mapping[str, Mapping[Any, float]], how: Normalisation) -> dict[str, dict[Any, float]]:
    """Return the scores of each model, comparable between subtasks. scores: model -> subtask -> score.

    best: divided by the best model's score; range: 0 for the worst and 1 for the best; none: unchanged. A subtask that all models fail is 0
    for all, one where all are equal is 1 with "range".
    """
    made: dict[str, dict[Any, float]] = {name: {} for name in scores}
    for subtask in next(iter(scores.values()), {}):
        values = [each[subtask] for each in scores.values()]
        for name, each in scores.items():
            made[name][subtask] = _one(each[subtask], min(values), max(values), how)
    return made


def _one(score: float, worst: float, best: float, how: Normalisation) -> float:
    if how == "none" or best == 0:
        return score
    if how == "best":
        return score / best
    return 1.0 if best == worst else (score - worst) / (best - worst)


def compared(models: Sequence[Mapping[str, Any]], how: Normalisation) -> list[dict[str, Any]]:
    """Return the models with "mean" (of the raw scores of all subtasks) and "normalised" (of the comparable ones) added.

    models: {"name", "tasks": a summary}. Raise DataError if two names are equal or a model was asked something else.
    """
    scores = {model["name"]: subtasks(model["tasks"]) for model in models}
    if len(scores) < len(models):
        raise DataError("two models have the same name: give each its own with --names")
    first = models[0]["name"]
    for name, each in scores.items():
        if set(each) != set(scores[first]):
            raise DataError(f"{name} was asked other tasks or lengths than {first}: compare results of the same ones")
    comparable = normalised(scores, how)
    return [
        {**model, "mean": fmean(scores[name].values()), "normalised": fmean(comparable[name].values())}
        for model, name in zip(models, scores, strict=True)
    ]


def by_length(model: Mapping[str, Any], lengths: Sequence[int]) -> list[float]:
    """Return the mean score of all tasks at each length."""
    return [fmean(cells[str(length)]["score"] for cells in model["tasks"].values()) for length in lengths]


def lengths_of(models: Sequence[Mapping[str, Any]]) -> list[int]:
    return sorted({length for model in models for _, length in subtasks(model["tasks"])})
