"""Results of earlier measurements: read, checked and joined."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from megatron_ft.errors import ConfigError, DataError, kind_of
from megatron_ft.evaluation.retrieval.tasks import Documents, KeyValues, Lines, Topics
from megatron_ft.files import read_json
from megatron_ft.wording import counted

SETTINGS = ("seed", "samples", "lengths", "depths", "key_digits", "max_new_tokens", "system", "topics", "documents")
"""What results must have in common, named as the flags are. topics, documents: digests of the files, None without one."""
_OPTIONAL = ("system", "topics", "documents")
TASKS = frozenset(task.name for task in (KeyValues, Topics, Lines, Documents))


def joined(files: Sequence[str], names: Sequence[str]) -> dict[str, Any]:
    """Return the models of several results as one, with their recorded names or with `names`.

    Raise DataError for files that are no results or were measured in another way than the first, ConfigError for names that do not fit.
    """
    results = [read_result(path) for path in files]
    for path, result in zip(files, results, strict=True):
        _check_alike(path, result, files[0], results[0])
    models = [model for result in results for model in result["models"]]
    if names and len(names) != len(models):
        raise ConfigError(
            f"--names has {counted(len(names), 'name')} for {counted(len(models), 'model')} in --results: give one for each"
        )
    renamed = [{**model, "name": name} for model, name in zip(models, names, strict=True)] if names else models
    return {**results[0], "models": renamed}


def _check_alike(path: str, result: Mapping[str, Any], first_path: str, first: Mapping[str, Any]) -> None:
    if other := [name for name in SETTINGS if result.get(name) != first.get(name)]:
        flags = " and ".join(f"--{name}" for name in other)
        raise DataError(f"{path}: measured with another {flags} than {first_path}; measure both alike")


def read_result(path: str | Path) -> dict[str, Any]:
    """Return the content of a retrieval.json. Raise DataError if it is none, or not as it was written."""
    result = read_json(path)
    needed = {*SETTINGS, "models"}.difference(_OPTIONAL)
    if not isinstance(result, dict) or not needed <= set(result):
        raise DataError(f"{path}: is not a result of evaluate retrieval; give its retrieval.json")
    if wrong := _fault(result["models"]):
        raise DataError(f"{path}: {wrong}; measure again, or restore the file")
    return result


def _fault(models: Any) -> str | None:
    """Return what is wrong with the models of a result."""
    if not isinstance(models, list) or not models:
        return f'"models" must be a list of at least one model, not {_shown(models)}'
    for number, model in enumerate(models, 1):
        if not isinstance(model, dict):
            return f"model {number} must be an object, not {kind_of(model)}"
        if not isinstance(model.get("name"), str) or not model["name"]:
            return f'model {number} needs a "name"'
        if wrong := _bad_entry(model.get("tasks"), "task", TASKS.__contains__, _bad_task):
            return f"model {model['name'][:80]!r}: {wrong}"
    return None


def _bad_task(cells: Any) -> str | None:
    return _bad_entry(cells, "length", _is_length, _bad_cell)


def _bad_cell(cell: Any) -> str | None:
    if not isinstance(cell, dict):
        return f"must be an object, not {kind_of(cell)}"
    return _bad_score(cell.get("score")) or _bad_entry(cell.get("depths"), "depth", _is_depth, _bad_score)


def _bad_entry(value: Any, what: str, is_key: Callable[[str], bool], fault: Callable[[Any], str | None]) -> str | None:
    """Return what is wrong with an object whose keys are tasks, lengths or depths."""
    if not isinstance(value, dict) or not value:
        return f"needs an object with an entry for each {what}, not {_shown(value)}"
    for key, entry in value.items():
        if not is_key(key):
            return f"{key[:40]!r} is no {what}"
        if wrong := fault(entry):
            return f"{what} {key}: {wrong}"
    return None


def _shown(value: Any) -> str:
    return "an empty one" if value in ([], {}) else kind_of(value)


def _bad_score(score: Any) -> str | None:
    return None if _is_share(score) else "needs a score from 0 to 1"


def _is_length(key: str) -> bool:
    return key.isdecimal() and len(key) < 10 and str(int(key)) == key


def _is_depth(key: str) -> bool:
    try:
        return f"{float(key):g}" == key and _is_share(float(key))
    except ValueError:
        return False


def _is_share(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and 0 <= value <= 1
