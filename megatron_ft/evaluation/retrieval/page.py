"""The page and the figures of retrieval results: heat maps by length and depth, and several models compared."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from html import escape
from pathlib import Path
from typing import Any

from megatron_ft.evaluation.retrieval.results import by_length, lengths_of, subtasks
from megatron_ft.files import atomic_file
from megatron_ft.report.by_length import by_length as chart
from megatron_ft.report.curves import bars
from megatron_ft.report.heat_map import heat_map
from megatron_ft.report.page import Page, table
from megatron_ft.wording import counted

Model = Mapping[str, Any]
ACROSS, DOWN, UP = "length (tokens)", "depth of the answer (%)", "right answers (%)"
NORMALISATIONS = {
    "best": "each subtask's score divided by the best model's, then averaged",
    "range": "each subtask's score between the worst (0) and the best model (1), then averaged",
    "none": "the mean of all subtasks",
}


def write_page(folder: Path, result: Mapping[str, Any]) -> Path:
    """Write retrieval.html and its figures as SVG files into a folder; return the page's path."""
    models = result["models"]
    page = Page("Retrieval from long prompts", _subtitle(result))
    if len(models) > 1:
        _comparison(page, folder, models, result["normalisation"])
    page.section("Scores by task and length", scores_table(models), note="Right answers in percent.")
    for model in models:
        drawn = {task: heat_map_of(task, cells) for task, cells in model["tasks"].items()}
        for task, svg in drawn.items():
            _write(folder / f"{_plain(model['name'])}-{task}.svg", svg)
        figures = "".join(_figure(task, svg) for task, svg in drawn.items())
        page.section(model["name"], f'<div class="pictures">{figures}</div>', note=_DEPTH)
    target = folder / "retrieval.html"
    page.write(target)
    return target


_DEPTH = "Right answers in percent, by the length of prompt and answer and by where in the prompt the answer stands (0: at the start)."


def _subtitle(result: Mapping[str, Any]) -> str:
    return (
        f"{counted(result['samples'], 'prompt')} for each task, length and depth; seed {result['seed']}; answers of up to "
        f"{result['max_new_tokens']} "
        "tokens, greedy"
    )


def _comparison(page: Page, folder: Path, models: Sequence[Model], how: str) -> None:
    lengths = lengths_of(models)
    svg = chart("All tasks by length", lengths, {each["name"]: by_length(each, lengths) for each in models}, ACROSS, UP)
    _write(folder / "comparison.svg", svg)
    ordered = sorted(models, key=lambda each: -each["normalised"])
    means = bars([(each["name"], each["normalised"], f"{100 * each['normalised']:.1f}%") for each in ordered])
    page.section(
        "Comparison", f"<h3>mean of all subtasks, normalised</h3>{means}", note=f"Normalised: {NORMALISATIONS[how]}."
    )
    page.section("Mean of all tasks by length", svg)


def scores_table(models: Sequence[Model]) -> str:
    """Return the table of all subtasks: a row for each, a column for each model."""
    names, lines = scores_rows(models)
    head, *rows = zip(names, *lines, strict=True)
    return table(head, rows, ("", *["num"] * (len(head) - 1)))


def scores_rows(models: Sequence[Model]) -> tuple[list[str], list[list[str]]]:
    """Return names of columns, and a row of percentages for each model."""
    columns = list(subtasks(models[0]["tasks"]))
    head = ["", *(f"{task} {_short(length)}" for task, length in columns), "mean"]
    rows = []
    for model in models:
        scores = subtasks(model["tasks"])
        rows.append([model["name"], *(f"{100 * scores[each]:.1f}" for each in columns), f"{100 * model['mean']:.1f}"])
    if len(models) > 1:
        head.append("normalised")
        rows = [[*row, f"{100 * model['normalised']:.1f}"] for row, model in zip(rows, models, strict=True)]
    return head, rows


def _short(length: int) -> str:
    return f"{length // 1024}K" if length % 1024 == 0 else str(length)


def heat_map_of(task: str, cells: Mapping[str, Any]) -> str:
    """Return the heat map of one task as SVG."""
    lengths = sorted(map(int, cells))
    depths = sorted({float(depth) for cell in cells.values() for depth in cell["depths"]})
    found = {
        (x, y): cells[str(length)]["depths"][f"{depth:g}"]
        for x, length in enumerate(lengths)
        for y, depth in enumerate(depths)
        if f"{depth:g}" in cells[str(length)]["depths"]
    }
    rows = [f"{100 * depth:.0f}" for depth in depths]
    return heat_map(task, [f"{length:,}" for length in lengths], rows, found, ACROSS, DOWN)


def _figure(title: str, svg: str) -> str:
    return f"<figure><figcaption><b>{escape(title)}</b></figcaption>{svg}</figure>"


def _plain(name: str) -> str:
    """Return a model's name as a file may be called."""
    return "".join(letter if letter.isalnum() or letter in "._-" else "-" for letter in name).lstrip(".") or "model"


def _write(path: Path, svg: str) -> None:
    with atomic_file(path, "w") as file:
        file.write(svg + "\n")
