"""Run lm-eval on a loaded model: tasks of local files, without the network."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import lm_eval
from lm_eval.tasks import TaskManager

from megatron_ft.config.hints import nearest
from megatron_ft.errors import ConfigError, DataError


def task_manager(folders: Sequence[str], own: bool, tasks: Sequence[str]) -> TaskManager:
    """Return lm-eval's index of the tasks. own: with those that lm-eval brings. Raise ConfigError for a task that is not there."""
    manager = TaskManager(include_path=list(folders) or None, include_defaults=own)
    for task in tasks:
        if task not in manager.all_tasks:
            where = " and ".join([*folders, *(["lm-eval's own tasks"] if own else [])])
            hint = nearest(task, manager.all_tasks) or (
                "" if own else "; --lm_eval_tasks adds those of lm-eval, whose data it downloads"
            )
            raise ConfigError(f"--tasks {task}: no such task in {where}{hint}")
    return manager


def scores(lm: Any, tasks: Sequence[str], manager: TaskManager, **options: Any) -> dict[str, Any]:
    """Return lm-eval's results, {} on ranks to which it returns none. Raise DataError for data that is missing or cannot be read."""
    from datasets.exceptions import DatasetsError

    try:
        found = lm_eval.simple_evaluate(lm, tasks=list(tasks), task_manager=manager, **options)
    except (FileNotFoundError, ConnectionError, DatasetsError) as error:
        raise DataError(
            f"data of {', '.join(tasks)}: {' '.join(str(error).split())}; check dataset_kwargs in the task"
        ) from error
    return dict(found) if found else {}


def rows(results: dict[str, Any]) -> list[tuple[str, str, str, str]]:
    """Return task, few-shot examples, metric and value of every score."""
    found = []
    for task, values in sorted(results["results"].items()):
        shots = str(results.get("n-shot", {}).get(task, ""))
        for key, value in values.items():
            metric, _, filtered = key.partition(",")
            if isinstance(value, int | float) and filtered and not metric.endswith("_stderr"):
                name = metric if filtered == "none" else f"{metric} ({filtered})"
                error = values.get(f"{metric}_stderr,{filtered}")
                spread = f" ± {error:.4f}" if isinstance(error, float) else ""
                found.append((task, shots, name, f"{value:.4f}{spread}"))
    return found
