"""The page that compares runs: losses in one figure, gradient norms of the first steps, a table, the settings that differ."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from megatron_ft.report.curves import short
from megatron_ft.report.page import Page, table
from megatron_ft.report.runs import By, RunCurves, common_end, differing_settings, same_samples
from megatron_ft.report.several import legend, overlay
from megatron_ft.wording import counted

NORMS = ("run", "step 1", "largest", "mean", "last")


def write_comparison(runs: Sequence[RunCurves], target: Path, by: By, first_steps: int, smoothing: int) -> None:
    """Write the page. smoothing: number of steps whose mean is drawn."""
    names = [run.name for run in runs]
    across = "optimizer step" if by == "step" else "tokens read"
    page = Page(f"{len(runs)} runs compared by {by}", ", ".join(names))
    page.section("Loss", legend(names), _losses(runs, by, across, smoothing), note=_about(by, smoothing))
    page.section("Result", table(head(runs, by), result_rows(runs, by), ["", *["num"] * 7]), note=_place(runs))
    page.section(
        f"Gradient norm of the first {counted(first_steps, 'step')}",
        legend(names),
        _norms(runs, first_steps),
        note="Before clipping. A method that changes the model's positions too far begins with large gradients.",
    )
    page.section("Settings that differ", _settings(runs))
    page.write(target)


def head(runs: Sequence[RunCurves], by: By) -> tuple[str, ...]:
    """Return the names of the result's columns."""
    there = common_end(runs, by)
    where = f"step {there:,.0f}" if by == "step" else f"{short(there)} tokens"
    first = ("run", "steps", "tokens", "loss, first step", f"loss at {where}")
    return (*first, "loss, end", "validation, end", "validation, lowest")


def result_rows(runs: Sequence[RunCurves], by: By) -> list[tuple[str, ...]]:
    """Return the cells of each run, with the lowest loss at the last place that all reached first."""
    there = common_end(runs, by)
    ordered = sorted(runs, key=lambda run: run.loss_at(there, by))
    return [
        (
            run.name, f"{run.length('step'):,.0f}", short(run.metrics.total("train/tokens")),
            f"{run.metrics.values('train/loss')[0]:.4f}", f"{run.loss_at(there, by):.4f}",
            f"{run.loss_at(run.length(by), by):.4f}", *_held_out(run),
        )
        for run in ordered
    ]  # fmt: skip


def norm_rows(runs: Sequence[RunCurves], count: int) -> list[tuple[str, ...]]:
    """Return the cells of NORMS for each run."""
    rows = []
    for run in runs:
        norms = [value for _, value in run.first_norms(count)]
        values = (norms[0], max(norms), sum(norms) / len(norms), norms[-1]) if norms else ()
        rows.append((run.name, *(f"{value:.4g}" for value in values), *[""] * (4 - len(values))))
    return rows


def _held_out(run: RunCurves) -> tuple[str, str]:
    values = run.metrics.values("eval/loss")
    return (f"{values[-1]:.4f}", f"{min(values):.4f}") if values else ("", "")


def _losses(runs: Sequence[RunCurves], by: By, across: str, smoothing: int) -> str:
    figures = [
        overlay(
            "training loss",
            [(run.name, smoothed(run.points("train/loss", by), smoothing)) for run in runs],
            across,
            "nats per trained token (logarithmic)",
        ),
        overlay(
            "validation loss",
            [(run.name, run.points("eval/loss", by)) for run in runs],
            across,
            "nats per trained token (logarithmic)",
        ),
    ]
    return f'<div class="pictures">{"".join(figures)}</div>'


def _norms(runs: Sequence[RunCurves], count: int) -> str:
    lines = [(run.name, [(float(at), value) for at, value in run.first_norms(count)]) for run in runs]
    figure = overlay("gradient norm", lines, "optimizer step", "norm, logarithmic")
    return f'<div class="pictures">{figure}{table(NORMS, norm_rows(runs, count), ["", *["num"] * 4])}</div>'


def smoothed(points: Sequence[tuple[float, float]], count: int) -> list[tuple[float, float]]:
    """Return at each place the mean of the last `count` values."""
    values = [value for _, value in points]
    return [
        (at, sum(recent) / len(recent))
        for i, (at, _) in enumerate(points)
        for recent in [values[max(0, i + 1 - count) : i + 1]]
    ]


def _about(by: By, smoothing: int) -> str:
    text = "The axes of loss are logarithmic."
    if smoothing > 1:
        text += f" Training losses are means of {smoothing:,} steps."
    return text + (" Tokens are those that the run read, without padding." if by == "tokens" else "")


def _place(runs: Sequence[RunCurves]) -> str:
    same = same_samples(runs)
    used = {True: "used the same samples in the same order", False: "did not use the same samples", None: ""}[same]
    text = "Lowest loss first, at the last place that all runs reached. Losses are means of ten steps."
    return f"{text} Up to step {common_end(runs, 'step'):,.0f} the runs {used}." if used else text


def _settings(runs: Sequence[RunCurves]) -> str:
    rows = [(name, *values) for name, values in differing_settings(runs)]
    if not rows:
        return "<p>None of those in training.yaml.</p>"
    return table(("setting", *(run.name for run in runs)), rows, ["code"] * (len(runs) + 1))
