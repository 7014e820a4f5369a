"""Sampling reports: prompts x settings -> answers, with settings and result in the layout of Open-Assistant's files."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from megatron_ft.errors import DataError
from megatron_ft.files import read_json
from megatron_ft.generation.sampling import Sampling

_NUMBERS = {"temperature", "top_k", "top_p", "repetition_penalty", "max_new_tokens"}
_KNOWN = _NUMBERS | {"do_sample", "early_stopping"}  # early_stopping concerns beams, which there are none of


@dataclass(frozen=True)
class Setting:
    """One way of sampling. given: its generate_args as in the file. system: its pre_text."""

    name: str
    given: dict[str, Any]
    system: str | None = None

    @property
    def is_greedy(self) -> bool:
        return not self.given.get("do_sample", True)

    @property
    def max_new_tokens(self) -> int:
        return int(self.given.get("max_new_tokens", 256))

    @property
    def sampling(self) -> Sampling:
        """The parameters, with transformers' defaults for those that are not given."""
        penalty = float(self.given.get("repetition_penalty", 1.0))
        if self.is_greedy:
            return Sampling(repetition_penalty=penalty)
        given = self.given
        return Sampling(
            float(given.get("temperature", 1.0)), int(given.get("top_k", 50)), float(given.get("top_p", 1.0)), penalty
        )


def read_settings(path: Path) -> list[Setting]:
    """Read a file of settings: {"default": {...}, "configurations": [{"name": ..., "generate_args": {...}}]}. Raise DataError."""
    content = read_json(path)
    entries = content.get("configurations") if isinstance(content, dict) else None
    if not isinstance(entries, list) or not entries or not all(isinstance(one, dict) for one in entries):
        raise DataError(f'{path}: needs {{"configurations": [{{"name": text, "generate_args": {{...}}}}]}}')
    default = content.get("default") or {}
    settings = [_setting(default, one, f"{path}, configuration {n}") for n, one in enumerate(entries, 1)]
    if len({one.name for one in settings}) < len(settings):
        raise DataError(f"{path}: two configurations have the same name; give each its own")
    return settings


def _setting(default: dict[str, Any], entry: dict[str, Any], where: str) -> Setting:
    given = {**default.get("generate_args", {}), **entry.get("generate_args", {})}
    name = entry.get("name") or default.get("name")
    if not isinstance(name, str):
        raise DataError(f'{where}: has no "name"')
    if unknown := [key for key in given if key not in _KNOWN]:
        raise DataError(f"{where}: {unknown[0]} is not supported; supported are {', '.join(sorted(_KNOWN))}")
    for key in _NUMBERS & given.keys():
        if isinstance(given[key], bool) or not isinstance(given[key], int | float) or given[key] < 0:
            raise DataError(f"{where}: {key} is {given[key]!r}; write a number that is not negative")
    setting = Setting(name, given, entry.get("pre_text") or default.get("pre_text"))
    sampling = setting.sampling
    if setting.max_new_tokens < 1 or not 0 < sampling.top_p <= 1 or sampling.repetition_penalty == 0:
        raise DataError(f"{where}: max_new_tokens, top_p (at most 1) and repetition_penalty must be above 0")
    return setting


def as_report(
    model: str, date: str, arguments: dict[str, Any], prompts: Sequence[str], settings: Sequence[Setting],
    answers: Sequence[Sequence[Sequence[str]]],
) -> dict[str, Any]:  # fmt: skip
    """Return the report. answers: of each setting, for each prompt its answers."""
    results = [
        [
            {"sampling_config": one.name, "sampling_params": one.given, "outputs": list(given[i])}
            for one, given in zip(settings, answers, strict=True)
        ]
        for i in range(len(prompts))
    ]
    entries = [{"prompt": prompt, "results": result} for prompt, result in zip(prompts, results, strict=True)]
    return {"model_name": model, "date": date, "args": arguments, "prompts": entries}


def read_report(path: Path) -> dict[str, Any]:
    """Read a report of ours or of Open-Assistant. Raise DataError if it is none."""
    report = read_json(path)
    try:
        for entry in report["prompts"]:
            str(entry["prompt"]), [list(result["outputs"]) for result in entry["results"]]
        return {**report, "model_name": str(report["model_name"])}
    except (KeyError, TypeError) as error:
        raise DataError(f"{path}: not a sampling report ({type(error).__name__}: {error})") from error
