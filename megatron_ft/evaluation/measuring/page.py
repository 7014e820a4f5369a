"""The files of a measurement: measure.json, measure.html and a chart of each configuration as SVG."""

from __future__ import annotations

import contextlib
from collections.abc import Sequence
from dataclasses import dataclass
from html import escape
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

from megatron_ft import __version__, device
from megatron_ft.config.command import command_line
from megatron_ft.evaluation.measuring.job import Job, Measured
from megatron_ft.evaluation.measuring.verdict import HEAD, rows, verdict_of_four
from megatron_ft.files import atomic_file, write_json
from megatron_ft.report.page import Page, commands, table
from megatron_ft.report.two_axes import Axis, chart, figure, standalone
from megatron_ft.wording import counted

_MEMORY, _SECONDS = "peak memory, GB", "seconds"


@dataclass(frozen=True)
class Setting:
    """What all configurations share."""

    model: str
    backend: str
    device: str
    memory: str
    """How memory is measured, for people."""
    max_new_tokens: int
    versions: dict[str, str]


def setting_of(job: Job) -> Setting:
    """Return what a job shares with the others, and how this machine measures."""
    return Setting(
        job.model, job.backend, device.describe(),
        "allocated on the GPU by torch" if device.has_gpu() else "resident in the process (VmHWM), libraries included",
        job.max_new_tokens, _versions(),
    )  # fmt: skip


def _versions() -> dict[str, str]:
    found = {"megatron_ft": __version__}
    for name in ("torch", "transformers", "bitsandbytes", "megatron-core"):
        with contextlib.suppress(PackageNotFoundError):
            found[name] = version(name)
    return found


def write(folder: Path, setting: Setting, results: Sequence[Measured]) -> None:
    """Write all files into an existing folder."""
    values: dict[str, Any] = {"command": command_line(), **vars(setting), "verdict": verdict_of_four(results)}
    write_json(folder / "measure.json", {**values, "configurations": [one.to_json() for one in results]})
    for name, title, columns, below, axes in _charts(setting, results):
        with atomic_file(folder / f"{name}.svg", "w") as file:
            file.write(standalone(title, chart(title, columns, below, *axes), *axes))
    _page(setting, results).write(folder / "measure.html")


_Chart = tuple[str, str, list[str], str, tuple[Axis, Axis]]
"""File name, title, columns, name of the horizontal axis, axes."""


def _charts(setting: Setting, results: Sequence[Measured]) -> list[_Chart]:
    """Return one chart of all configurations, and one of the runs of each. Those of runs share their scales."""
    done = [one for one in results if not one.failed]
    if not done:
        return []
    model = Path(setting.model).name
    memory = [one.peak_bytes / 1e9 for one in done]
    names = [f"{one.bits} bits" for one in done]
    whole = (Axis(_MEMORY, memory), Axis(f"{_SECONDS} per run", [one.seconds for one in done]))
    longest = max(run.seconds for one in done for run in one.runs)
    charts: list[_Chart] = [("measure", f"{model}: peak memory and time by precision", names, "weights", whole)]
    for one, name in zip(done, names, strict=True):
        axes = (
            Axis(_MEMORY, [run.peak_bytes / 1e9 for run in one.runs], max(memory)),
            Axis(_SECONDS, [run.seconds for run in one.runs], longest),
        )
        numbers = [str(number) for number in range(1, len(one.runs) + 1)]
        charts.append((f"measure-{one.bits}", f"{model} in {name} ({one.kind})", numbers, "run", axes))
    return charts


def _page(setting: Setting, results: Sequence[Measured]) -> Page:
    versions = ", ".join(f"{name} {version}" for name, version in setting.versions.items())
    page = Page(f"Memory and time of {Path(setting.model).name}", f"{setting.device}; {versions}")
    count = len(results[0].runs)
    prompts = counted(count, "prompt") if count else "Several prompts"
    note = (
        f"{prompts}, {counted(setting.max_new_tokens, 'new token')} each, one after another, after a short "
        f"warm-up. "
        f"Each configuration in a process of its own. Memory: {setting.memory}."
    )
    page.section("Configurations", table(HEAD, _cells(results), ("num", "", *["num"] * 6)), _below(results), note=note)
    drawn = [
        figure(title, chart(title, columns, below, *axes), *axes)
        for _, title, columns, below, axes in _charts(setting, results)
    ]
    if drawn:
        page.section("Peak memory and time", f'<div class="pictures">{"".join(drawn)}</div>')
    for one in results:
        if one.runs:
            page.section(f"Runs in {one.bits} bits", _runs(one))
    page.section("Repeat", commands(command_line()))
    return page


def _below(results: Sequence[Measured]) -> str:
    """Return why configurations failed, and what the others say about 4 bits."""
    said = [f"{one.bits} bits failed: {one.failed}." for one in results if one.failed]
    return "".join(f'<p class="below">{escape(text)}</p>' for text in [*said, verdict_of_four(results)] if text)


def _cells(results: Sequence[Measured]) -> list[tuple[str, ...]]:
    """Return the table's rows. The reason of a failure would not fit into a cell."""
    return [(*row[:-1], "failed") if one.failed else row for one, row in zip(results, rows(results), strict=True)]


def _runs(one: Measured) -> str:
    head = ("run", "prompt, tokens", "new tokens", "s", "peak, GB", "answer")
    lines = [
        (n, run.prompt_tokens, run.new_tokens, f"{run.seconds:.2f}", f"{run.peak_bytes / 1e9:.3f}", run.answer)
        for n, run in enumerate(one.runs, 1)
    ]
    return table(head, lines, ("num", "num", "num", "num", "num", ""))
