"""Run lm-eval on a loaded model: tasks of local files, without the network."""

from __future__ import annotations

import contextlib
import io
from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING, Any

import lm_eval
from lm_eval import evaluator
from lm_eval.tasks import TaskManager

from megatron_ft.config.hints import nearest
from megatron_ft.errors import ConfigError, DataError

if TYPE_CHECKING:
    from megatron_ft.evaluation.harness.lm import RanksLM


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


def scores(lm: RanksLM, tasks: Sequence[str], manager: TaskManager, **options: Any) -> dict[str, Any]:
    """Return lm-eval's results, {} on ranks to which it returns none. Raise DataError for data that is missing or cannot be read."""
    from datasets.exceptions import DatasetsError

    try:
        with _only(lm.layout.is_main):
            found = lm_eval.simple_evaluate(lm, tasks=list(tasks), task_manager=manager, **options)
    except (FileNotFoundError, ConnectionError, DatasetsError) as error:
        raise DataError(
            f"data of {', '.join(tasks)}: {' '.join(str(error).split())}; check dataset_kwargs in the task"
        ) from error
    except ValueError as error:
        if "Sample larger than population" not in str(error):
            raise
        raise ConfigError(
            f"--num_fewshot {options.get('num_fewshot')}: a task of {', '.join(tasks)} has fewer examples; give a smaller number"
        ) from error
    return dict(found) if found else {}


@contextlib.contextmanager
def _only(is_main: bool) -> Iterator[None]:
    """Show progress bars of lm-eval and its libraries on the first rank alone. Errors pass on every rank."""
    # Not used; git would complain on the screen where there is no repository, and pip would be started by every rank.
    evaluator.get_git_commit_hash, evaluator.add_env_info = (lambda: None), (lambda results: None)
    with contextlib.ExitStack() as stack:
        if not is_main:
            stack.enter_context(contextlib.redirect_stderr(io.StringIO()))
        yield
