"""The report of small.sh: held-out loss, zeros and speed of each model, before the swap and after; what the teacher adds.

python results.py OUT_DIR

OUT_DIR/results.json and results.html: from sparsity/sparsity.json, speed/NAME.txt and the metrics of the runs.
"""

from __future__ import annotations

import re
import statistics
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from megatron_ft.errors import DataError, UserError
from megatron_ft.files import read_json, write_json
from megatron_ft.report.by_length import by_length
from megatron_ft.report.curves import Line, picture
from megatron_ft.report.metrics import read_metrics
from megatron_ft.report.page import Page, table

WHAT = {
    "gelu": "before: GELU",
    "swapped": "swapped for ReLU, not trained",
    "lm": "ReLU, trained with LM alone",
    "kd": "ReLU, trained with LM + KL to the teacher",
}
HEAD = (
    "model", "what", "held-out loss", "recovered", "zeros", "near zero", "training tokens/s", "decoding tokens/s", "kernel, dense",
    "kernel, exact", "kernel, predicted",
)  # fmt: skip
MODES = ("dense", "exact", "predicted")
"""Of sparse decoding, which models with GELU do not have."""
_SPEED = re.compile(r"new tokens \(([\d,.]+) tokens/s\)")


def collect(out: Path) -> list[dict[str, Any]]:
    """Return an entry for each model. Raise UserError for a missing or damaged file."""
    models = {one["name"]: one for one in read_json(out / "sparsity" / "sparsity.json")["models"]}
    if missing := {"gelu", "swapped"} - models.keys():
        raise DataError(f"{out}: no results of {', '.join(sorted(missing))}: run small.sh again")
    before, swapped = models["gelu"]["loss"], models["swapped"]["loss"]
    return [
        {
            "name": name,
            "what": WHAT[name.split("-")[0]],
            "loss": one["loss"],
            "recovered": (swapped - one["loss"]) / (swapped - before) if before < swapped else None,
            "zeros": one["zeros"],
            "near_zero": one["near_zero"],
            "layers": [layer["zeros"] for layer in one["layers"]],
            "training_tokens_per_second": _training_speed(out / name),
            "decoding_tokens_per_second": _decoding_speed(out / "speed" / f"{name}.txt"),
            **{
                f"{mode}_decoding_tokens_per_second": _decoding_speed(out / "speed" / f"{name}-{mode}.txt")
                for mode in MODES
            },
        }
        for name, one in models.items()
    ]


def _training_speed(run: Path) -> float | None:
    speeds = read_metrics(run / "metrics.jsonl").values("train/tokens_per_second")
    return statistics.median(speeds) if speeds else None


def _decoding_speed(path: Path) -> float | None:
    found = _SPEED.search(path.read_text()) if path.is_file() else None
    return float(found[1].replace(",", "")) if found else None


def recoveries(entries: Sequence[Mapping[str, Any]]) -> dict[str, list[float]]:
    """Return the held-out losses of each objective, in the order of the seeds."""
    found: dict[str, list[float]] = {}
    for entry in entries:
        objective, dash, _ = entry["name"].partition("-")
        if dash:
            found.setdefault(objective, []).append(entry["loss"])
    return found


def verdict(entries: Sequence[Mapping[str, Any]]) -> str:
    """Say what the teacher adds, by the means over the seeds."""
    losses = recoveries(entries)
    if set(losses) != {"lm", "kd"}:
        return "Only one objective was run, so there is nothing to compare."
    alone, both = (statistics.mean(losses[name]) for name in ("lm", "kd"))
    better = sum(kd < lm for lm, kd in zip(losses["lm"], losses["kd"], strict=True))
    return (
        f"Mean held-out loss after the same tokens: {alone:.4f} with LM alone, {both:.4f} with LM + KL; LM + KL is lower for {better} of "
        f"{len(losses['lm'])} seeds."
    )


def rows(entries: Sequence[Mapping[str, Any]]) -> list[tuple[str, ...]]:
    return [
        (
            one["name"], one["what"], f"{one['loss']:.4f}", _shown(one["recovered"], ".1%"), f"{one['zeros']:.2%}",
            f"{one['near_zero']:.2%}", _shown(one["training_tokens_per_second"], ",.0f"),
            *(_shown(one[f"{way}decoding_tokens_per_second"], ",.1f") for way in ("", *(f"{mode}_" for mode in MODES))),
        )
        for one in entries
    ]  # fmt: skip


def _shown(value: float | None, form: str) -> str:
    return "" if value is None else f"{value:{form}}"


def write(out: Path, entries: Sequence[Mapping[str, Any]]) -> None:
    """Write results.json and results.html."""
    write_json(out / "results.json", {"models": entries, "verdict": verdict(entries)})
    page = Page("ReluFalcon in small", str(out))
    note = (
        "Recovered: the share of the loss between the swapped model and the one before. Decoding: one answer at a time, by the engine; "
        "models with ReLU also by the kernel of sparse decoding, without leaving out zeros (dense), with (exact), and with what predictors "
        "call zero (predicted)."
    )
    page.section(
        "Before and after",
        table(HEAD, rows(entries), ("", "", *["num"] * (len(HEAD) - 2))),
        f"<p>{verdict(entries)}</p>",
        note=note,
    )
    layers = range(len(entries[0]["layers"]))
    zeros = by_length(
        "Zeros by layer", layers, {one["name"]: one["layers"] for one in entries}, "layer", "zeros (percent)"
    )
    page.section("Exact zeros in the MLPs by layer", f'<figure style="max-width:760px">{zeros}</figure>')
    names = [one["name"] for one in entries if "-" in one["name"]]
    lines = [
        Line(name, read_metrics(out / name / "metrics.jsonl").curve("train/sparsity"), f"n{number % 6 + 1}")
        for number, name in enumerate(names)
    ]
    page.section("Zeros during recovery", picture("exact zeros (share)", lines))
    page.write(out / "results.html")


def main(out: Path) -> None:
    entries = collect(out)
    write(out, entries)
    lines = [HEAD, *rows(entries)]
    widths = [max(len(line[column]) for line in lines) for column in range(len(HEAD))]
    for line in lines:
        print(
            "  ".join(
                f"{cell:{'<' if n < 2 else '>'}{width}}"
                for n, (cell, width) in enumerate(zip(line, widths, strict=True))
            )
        )
    print(verdict(entries))
    print(out / "results.html")


if __name__ == "__main__":
    if len(sys.argv) != 2:
        sys.exit(__doc__)
    try:
        main(Path(sys.argv[1]))
    except UserError as error:
        print(f"results.py: {error}", file=sys.stderr)
        sys.exit(2)
