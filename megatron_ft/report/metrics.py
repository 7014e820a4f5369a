"""Reads metrics.jsonl as curves, with the names of docs/metrics.md."""

import json
from dataclasses import dataclass, field
from pathlib import Path

from megatron_ft.errors import DataError

_OF_LABELS = {"train/loss", "train/perplexity"}
Curve = list[tuple[int, float]]  # (iteration, value), by iteration


@dataclass
class Metrics:
    """curves: metric name -> its values; NaN values are counted and left out, and so is the loss, 0, of steps without a supervised
    token. checkpoints: iteration -> folder. samples: iteration -> hash of all samples used so far."""

    curves: dict[str, Curve] = field(default_factory=dict)
    checkpoints: dict[int, str] = field(default_factory=dict)
    samples: dict[int, str] = field(default_factory=dict)
    not_finite: int = 0

    def curve(self, name: str) -> Curve:
        return self.curves.get(name, [])

    def values(self, name: str) -> list[float]:
        return [value for _, value in self.curve(name)]

    def total(self, name: str) -> float:
        return sum(self.values(name))

    def rate(self, name: str) -> Curve:
        """Return a count per step as a count per second."""
        seconds = dict(self.curve("train/seconds"))
        return [(at, value / seconds[at]) for at, value in self.curve(name) if seconds.get(at)]


def read_metrics(path: Path) -> Metrics:
    """Read the file. Raise DataError with file and line. An incomplete last line (the run is still writing) is left out.

    A resumed run may repeat iterations; the later line counts.
    """
    metrics = Metrics()
    found: dict[str, dict[int, float | None]] = {}
    lines = path.read_text(encoding="utf-8").splitlines() if path.is_file() else []
    for number, line in enumerate(lines, 1):
        try:
            entry = json.loads(line)
            iteration = int(entry.pop("iteration"))
        except (ValueError, KeyError, AttributeError, TypeError) as error:
            if number == len(lines):
                break
            raise DataError(f"{path}, line {number}: not a line of metrics ({error}); remove it") from error
        if "checkpoint" in entry:
            metrics.checkpoints[iteration] = entry["checkpoint"]
        if isinstance(used := entry.get("train/samples_hash"), str):
            metrics.samples[iteration] = used
        for name, value in entry.items():
            if value is None or isinstance(value, int | float):
                found.setdefault(name, {})[iteration] = value
    for name, by_iteration in found.items():
        metrics.curves[name] = [(at, value) for at, value in sorted(by_iteration.items()) if value is not None]
    empty = {at for at, value in found.get("train/empty", {}).items() if value}
    for name in _OF_LABELS & metrics.curves.keys() if empty else ():
        metrics.curves[name] = [(at, value) for at, value in metrics.curves[name] if at not in empty]
    metrics.not_finite = sum(value is None for value in found.get("train/loss", {}).values())
    return metrics
