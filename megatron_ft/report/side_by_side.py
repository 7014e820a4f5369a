"""The page of sampling reports: every prompt with the answers of each model beside each other."""

from __future__ import annotations

from collections.abc import Sequence
from html import escape
from pathlib import Path
from typing import Any

from megatron_ft.report.page import Html, Page, table


def write_side_by_side(reports: Sequence[dict[str, Any]], target: Path) -> None:
    """Write the page of one or more reports. A prompt or setting that a report lacks leaves its cell empty."""
    names = [report["model_name"] for report in reports]
    page = Page("Sampling report", " and ".join(names))
    for number, prompt in enumerate(_in_order(entry["prompt"] for report in reports for entry in report["prompts"]), 1):
        found = [_results(report, prompt) for report in reports]
        settings = _in_order(name for results in found for name in results)
        rows = [(name, *(_cell(results.get(name, [])) for results in found)) for name in settings]
        question = f'<div class="chat"><span class="role prompter">{escape(prompt)}</span></div>'
        page.section(f"Prompt {number}", question, table(("settings", *names), rows))
    page.write(target)


def _in_order(names: Any) -> list[str]:
    return list(dict.fromkeys(names))


def _results(report: dict[str, Any], prompt: str) -> dict[str, list[str]]:
    return {
        result["sampling_config"]: result["outputs"]
        for entry in report["prompts"]
        if entry["prompt"] == prompt
        for result in entry["results"]
    }


def _cell(outputs: Sequence[str]) -> Html:
    return Html("".join(f'<div class="chat">{escape(text)}</div>' for text in outputs))
