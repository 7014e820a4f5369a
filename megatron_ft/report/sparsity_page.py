"""The page of `evaluate sparsity`: a line for each model over its layers, and tables."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from megatron_ft.files import atomic_file
from megatron_ft.report.by_length import by_length
from megatron_ft.report.page import Page, table

HEAD = ("model", "activation", "loss", "zeros", "near zero", "fewest zeros", "most zeros")
_UP = "zeros (percent)"


def write_page(result: Mapping[str, Any], page: Path, figure: Path) -> None:
    """Write the page and the figure of exact zeros alone. result: as in sparsity.json."""
    models = result["models"]
    exact, near = (_chart(models, kind) for kind in ("zeros", "near_zero"))
    with atomic_file(figure, "w") as file:
        file.write(exact + "\n")
    html = Page("Zeros in the MLPs by layer", ", ".join(result["data"]))
    html.section(
        "Exact zeros",
        f'<figure style="max-width:760px">{exact}</figure>',
        table(HEAD, rows(models), ("", "", *["num"] * 5)),
        note=how(result),
    )
    html.section("Values near zero, exact zeros among them", f'<figure style="max-width:760px">{near}</figure>')
    head = ("layer", *(f"{model['name']}: {kind}" for model in models for kind in ("zeros", "near zero")))
    html.section("By layer", table(head, _layers(models), ("num", *["num"] * 2 * len(models))))
    html.write(page)


def how(result: Mapping[str, Any]) -> str:
    """Say what the numbers are, and what they were measured over."""
    counts = {model["tokens"] for model in result["models"]}
    tokens = f"{min(counts):,}" if len(counts) == 1 else f"{min(counts):,} to {max(counts):,}"
    return (
        f"Share of the values at the input of the down projection, over {tokens} tokens in pieces of up to {result['length']}, "
        f"{result['precision']}. Zeros: exactly 0. Near zero: at most {result['near']:.0%} of the largest value that the token has in "
        f"that layer. Loss: nats per token."
    )


def rows(models: Sequence[Mapping[str, Any]]) -> list[tuple[str, ...]]:
    """Return a row for each model."""
    return [_row(model) for model in models]


def _row(model: Mapping[str, Any]) -> tuple[str, ...]:
    ends = [f(model["layers"], key=lambda one: one["zeros"]) for f in (min, max)]
    return (
        model["name"], model["activation"], f"{model['loss']:.4f}", f"{model['zeros']:.2%}", f"{model['near_zero']:.2%}",
        *(f"{one['zeros']:.2%} (layer {one['layer']})" for one in ends),
    )  # fmt: skip


def _layers(models: Sequence[Mapping[str, Any]]) -> list[tuple[str, ...]]:
    most = max(len(model["layers"]) for model in models)
    return [(str(number), *(cell for model in models for cell in _cells(model, number))) for number in range(most)]


def _cells(model: Mapping[str, Any], number: int) -> tuple[str, str]:
    if number >= len(model["layers"]):
        return "", ""
    layer = model["layers"][number]
    return f"{layer['zeros']:.2%}", f"{layer['near_zero']:.2%}"


def _chart(models: Sequence[Mapping[str, Any]], kind: str) -> str:
    most = max(len(model["layers"]) for model in models)
    lines: dict[str, list[float | None]] = {}
    for model in models:
        values: list[float | None] = [layer[kind] for layer in model["layers"]]
        lines[model["name"]] = values + [None] * (most - len(values))
    return by_length("Zeros in the MLPs by layer", range(most), lines, "layer", _UP)
