"""Runs beside each other: reads their folders and computes what can be compared. Pure functions of metrics.jsonl and training.yaml."""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import accumulate
from pathlib import Path
from typing import Any, Literal

from megatron_ft.errors import ConfigError, DataError
from megatron_ft.report.metrics import Curve, Metrics, read_metrics
from megatron_ft.wording import counted

By = Literal["step", "tokens"]
LAST = 10  # number of steps whose mean is a run's loss at a place
_PLACES = {"save", "run_dir", "log_dir", "tensorboard_dir", "wandb_name"}


@dataclass(frozen=True)
class RunCurves:
    """A run with its name in tables and legends."""

    name: str
    folder: Path
    metrics: Metrics

    def points(self, metric: str, by: By) -> list[tuple[float, float]]:
        """Return a curve over steps, or over all tokens read up to each step."""
        curve = self.metrics.curve(metric)
        if by == "step":
            return [(float(at), value) for at, value in curve]
        read = self._tokens()
        return [(read[at], value) for at, value in curve if at in read]

    def length(self, by: By) -> float:
        """Return how far the run went, in steps or tokens."""
        return max((at for at, _ in self.points("train/loss", by)), default=0.0)

    def loss_at(self, place: float, by: By) -> float:
        """Return the mean training loss of the last ten steps up to a place that the run has reached."""
        points = self.points("train/loss", by)
        last = points[: bisect_right([at for at, _ in points], place)][-LAST:]
        return sum(value for _, value in last) / len(last)

    def first_norms(self, count: int) -> Curve:
        """Return the gradient norms of the first `count` steps that are recorded."""
        return self.metrics.curve("train/grad_norm")[:count]

    def samples_at(self, step: int) -> str | None:
        """Return the hash of all samples used up to a step, if it is recorded."""
        return self.metrics.samples.get(step)

    def _tokens(self) -> dict[int, float]:
        counts = self.metrics.curve("train/tokens")
        return dict(zip((at for at, _ in counts), accumulate(value for _, value in counts), strict=True))


def read_runs(folders: Sequence[Path], names: Sequence[str] = ()) -> list[RunCurves]:
    """Read the runs. names: one for each, default: the folders' names. Raise DataError or ConfigError."""
    if names and len(names) != len(folders):
        raise ConfigError(
            f"--names has {counted(len(names), 'name')} for {counted(len(folders), 'run')}: give one for each"
        )
    chosen = list(names) or _short_names(folders)
    if twice := [name for name in chosen if chosen.count(name) > 1]:
        raise ConfigError(f"two runs have the name {twice[0]}: give each folder once, and different --names")
    return [RunCurves(name, folder, _read(folder)) for name, folder in zip(chosen, folders, strict=True)]


def _read(folder: Path) -> Metrics:
    metrics = read_metrics(folder / "metrics.jsonl")
    if not metrics.curve("train/loss"):
        raise DataError(
            f"{folder}: no metrics.jsonl with training losses; give the folder of a run (finetune's --run_dir or --save)"
        )
    return metrics


def _short_names(folders: Sequence[Path]) -> list[str]:
    """Return as many last parts of each path as tell all of them apart."""
    parts = [folder.absolute().parts for folder in folders]
    for count in range(1, max(map(len, parts)) + 1):
        names = ["/".join(part[-count:]) for part in parts]
        if len(set(names)) == len(names):
            return names
    return [str(folder) for folder in folders]


def common_end(runs: Sequence[RunCurves], by: By) -> float:
    """Return the last place that every run has reached. Raise DataError without tokens."""
    for run in runs:
        if not run.points("train/loss", by):
            raise DataError(f"{run.folder}: metrics.jsonl has no train/tokens; compare --by step")
    return min(run.length(by) for run in runs)


def same_samples(runs: Sequence[RunCurves]) -> bool | None:
    """Return if all runs used the same samples up to the last step that all have; None: not recorded."""
    step = int(common_end(runs, "step"))
    hashes = [run.samples_at(step) for run in runs]
    return None if None in hashes else len(set(hashes)) == 1


def differing_settings(runs: Sequence[RunCurves]) -> list[tuple[str, list[str]]]:
    """Return (setting, its value in each run) of all settings that are not the same, without the names of folders."""
    settings = [_settings(run.folder / "training.yaml") for run in runs]
    names = {name: None for one in settings for name in one if name not in _PLACES}
    rows = [(name, [_text(one, name) for one in settings]) for name in names]
    return [(name, values) for name, values in rows if len(set(values)) > 1]


def _text(settings: dict[str, Any], name: str) -> str:
    if not settings:
        return "not recorded"
    value = settings.get(name)
    return "" if value is None else " ".join(map(str, value)) if isinstance(value, list) else str(value)


def _settings(path: Path) -> dict[str, Any]:
    """Return the settings of training.yaml; {} if it cannot be read."""
    import yaml

    try:
        read = yaml.safe_load(path.read_text(encoding="utf-8"))
    except (OSError, UnicodeDecodeError, yaml.YAMLError):
        return {}
    return read if isinstance(read, dict) else {}
