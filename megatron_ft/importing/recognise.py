"""Finds out which tool a file is for, and reads its keys or flags."""

from __future__ import annotations

import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from megatron_ft.config.yaml_file import read_mapping, yaml_value
from megatron_ft.errors import ConfigError
from megatron_ft.files import read_text
from megatron_ft.importing import axolotl, llama_factory, megatron, trl
from megatron_ft.importing.job import Job
from megatron_ft.importing.launchers import launched
from megatron_ft.importing.shell import Called, Script
from megatron_ft.importing.shell_words import shown, unknown, unknowns

TOOLS = ("megatron", "axolotl", "llama-factory", "trl")
_MAPPINGS = {"axolotl": axolotl, "llama-factory": llama_factory, "trl": trl}
_MEGATRON = re.compile(r"(?:pretrain|finetune|train|sft)\w*\.py")
_MEGATRON_SIGNS = (
    "tensor_model_parallel_size",
    "pipeline_model_parallel_size",
    "micro_batch_size",
    "num_layers",
    "global_batch_size",
)
_TRL = re.compile(r"(?:^|/)sft\w*\.py$")
_NOT_SFT = ("dpo", "grpo", "kto", "reward", "rloo", "ppo", "orpo")


@dataclass(frozen=True)
class Source:
    """A file to import. variables: values for a script's variables. arguments: those of the script. tool: None: found out."""

    path: str
    variables: dict[str, str]
    arguments: list[str]
    tool: str | None = None


def read(source: Source) -> Job:
    """Return the job of a file. Raise ConfigError for a file of no known tool."""
    place = Path(source.path)
    if place.suffix.lower() in (".yaml", ".yml", ".json"):
        return of_mapping(source.path, read_mapping(source.path), source.tool)
    return _of_script(source)


def of_mapping(path: str, values: dict[str, Any], tool: str | None, more: dict[str, Any] | None = None) -> Job:
    """Return the job of a YAML file. more: keys from a command line, which win."""
    values = values | (more or {})
    if (name := tool or tool_of(values)) == "llama-factory 1":
        raise ConfigError(
            f"{path}: files for version 1 of LLaMA-Factory are not read: use the keys of version 0 (model_name_or_path, ...)"
        )
    if name not in _MAPPINGS:
        raise ConfigError(
            f"{path}: not recognised: axolotl has base_model, LLaMA-Factory has dataset, template or stage, TRL has "
            f"model_name_or_path with dataset_name; name the tool with --tool"
        )
    return _MAPPINGS[name].job_of({str(key): value for key, value in values.items()}, "")


def tool_of(values: dict[str, Any]) -> str | None:
    """Return the tool whose keys these are."""
    if {"train_dataset", "peft_config", "dist_config"} & set(values) and "model" in values:
        return "llama-factory 1"
    if "base_model" in values:
        return "axolotl"
    if {"stage", "finetuning_type", "template", "cutoff_len", "dataset"} & set(values):
        return "llama-factory"
    if {"dataset_name", "model_name_or_path", "datasets"} & set(values):
        return "trl"
    return None


def _of_script(source: Source) -> Job:
    script = Script(source.path, source.variables, source.arguments)
    text = read_text(source.path)
    script.follow(text, source.path)
    found = [(call, kind) for call in script.calls if (kind := kind_of(call, source.tool))]
    if not found:
        raise ConfigError(_nothing(source, script))
    call, kind = found[0]
    job = _of_call(source, call, kind)
    launched(job, call, Path(source.path).parent)
    _add_notes(job, script, call)
    for other, _ in found[1:]:
        job.before.append(
            f"line {other.line} is another training command, which was not read: import it from a file of its own"
        )
    return job


def _nothing(source: Source, script: Script) -> str:
    for call in script.calls:
        for word in map(shown, call.words):
            if Path(word).name.removesuffix(".py") in _NOT_SFT:
                return (
                    f"{source.path}, line {call.line}: {word} is no supervised training, which is all that is done here"
                )
    if script.ended is not None and not source.arguments:
        return (
            f"{script.ended}: the script ends here without arguments: give them with --args, as in --args 'llama2 --size 7', or the "
            "variables that it asks for with --set"
        )
    if script.ended is not None:
        return f"{script.ended}: with these arguments the script ends here, before a training command"
    return (
        f"{source.path}: no training command found: torchrun ... pretrain_gpt.py or finetune.py, axolotl train FILE, "
        "llamafactory-cli train FILE, trl sft ... or sft.py ...; for YAML the name must end with .yaml"
    )


def _add_notes(job: Job, script: Script, call: Called) -> None:
    used = {name for word in call.words for name in unknowns(word)}
    for name in sorted(used & set(script.unknown_lines)):
        where = f"{shown(unknown(name))} (line {script.unknown_lines[name]})"
        how = f", or import with --set {name}=VALUE" if re.fullmatch(r"\w+", name) else ""
        job.before.append(f"{where} is not set in the script: fill it in{how}")
    job.before += script.notes


def kind_of(call: Called, tool: str | None) -> str | None:
    """Return the tool that a command starts."""
    words = [Path(shown(word)).name for word in call.words]
    joined = set(words)
    if ("axolotl" in joined and "train" in joined) or any("axolotl.cli.train" in word for word in call.words):
        return "axolotl"
    if {"llamafactory-cli", "llamafactory", "lmf"} & joined and "train" in joined:
        return "llama-factory"
    if "trl" in joined and "sft" in joined:
        return "trl"
    names = {word[2:].partition("=")[0].replace("-", "_") for word in call.words if word.startswith("--")}
    program = next((word for word in call.words if shown(word).endswith(".py")), None)
    if program is None:
        return None
    if tool in TOOLS:
        return tool
    if {"model_name_or_path", "dataset"} <= names and {"stage", "template", "finetuning_type"} & names:
        return "llama-factory"
    if _TRL.search(shown(program)) or {"model_name_or_path", "dataset_name"} <= names:
        return "trl"
    if _MEGATRON.search(shown(program)) and set(_MEGATRON_SIGNS) & names:
        return "megatron"
    return None


def _of_call(source: Source, call: Called, kind: str) -> Job:
    at = next((n for n, word in enumerate(call.words) if shown(word).endswith(".py")), None)
    if at is None:
        at = next(n for n, word in enumerate(call.words) if word in ("train", "sft"))
    elif "train" in call.words[:at]:
        at = call.words.index("train")
    elif "sft" in call.words[:at]:
        at = call.words.index("sft")
    words = call.words[at + 1 :]
    if kind == "megatron":
        return megatron.job_of(words)
    values, files = arguments(words)
    if "config" in values:
        files.append(str(values.pop("config")))
    for name in files:
        place = Path(name) if Path(name).is_file() else Path(source.path).parent / name
        if place.suffix in (".yaml", ".yml", ".json") and place.is_file():
            return of_mapping(str(place), read_mapping(str(place)), kind, values)
        if place.suffix in (".yaml", ".yml"):
            raise ConfigError(f"{source.path}, line {call.line}: {name} is not here; import that file itself")
    return _MAPPINGS[kind].job_of(values, "--")


def arguments(words: list[str]) -> tuple[dict[str, Any], list[str]]:
    """Return flags by name with their values as YAML reads them, and the words in front of the first flag. key=value is a flag too."""
    values: dict[str, Any] = {}
    before: list[str] = []
    name = ""
    for word in words:
        if word.startswith("--"):
            name, equals, text = word[2:].partition("=")
            name = name.replace("-", "_")
            values[name] = yaml_value(shown(text)) if equals else True
        elif not name and re.fullmatch(r"\w+=.*", word):
            key, _, text = word.partition("=")
            values[key] = yaml_value(shown(text))
        elif not name:
            before.append(word)
        elif values[name] is True:
            values[name] = yaml_value(shown(word))
        else:
            held = values[name]
            values[name] = [*(held if isinstance(held, list) else [held]), yaml_value(shown(word))]
    return values, before
