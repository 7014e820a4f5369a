"""What a launcher says: torchrun, torch.distributed, accelerate, deepspeed and the variables in front of a command."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

from megatron_ft.config.yaml_file import read_mapping
from megatron_ft.errors import UserError
from megatron_ft.importing.handlers import shard
from megatron_ft.importing.job import Job
from megatron_ft.importing.shell import Called
from megatron_ft.importing.shell_words import shown, unknowns


def launched(job: Job, call: Called, folder: Path) -> None:
    """Set the number of GPUs and machines, and what an accelerate file divides. folder: of the script."""
    job.gpus, job.nodes = job.gpus or gpus_of(call) or None, nodes_of(call) or 1
    if name := _value(call.words, "config_file"):
        _accelerate(job, shown(name), folder)


def _accelerate(job: Job, name: str, folder: Path) -> None:
    """Take the file that accelerate launch reads; without it, what its name says."""
    found = _settings(name, folder)
    kind, stage = str(found.get("distributed_type", "")), _stage(found, name)
    job.gpus = job.gpus or _processes(found, job.nodes)
    key = "accelerate's --config_file"
    if stage == 3 or kind == "FSDP" or (not kind and "fsdp" in name.lower()):
        shard(job, key, name)
    elif stage:
        job.set(key, name, "use_distributed_optimizer", True)
    else:
        job.ignore(key, name, "finetune --nproc_per_node starts the processes")


def _settings(name: str, folder: Path) -> dict[str, Any]:
    for place in (Path(name), folder / name):
        if place.is_file():
            try:
                return read_mapping(str(place))
            except UserError:
                return {}
    return {}


def _stage(found: dict[str, Any], name: str) -> int | None:
    """Return the stage of ZeRO; None: not used, as far as is known."""
    inner = found.get("deepspeed_config")
    stage = inner.get("zero_stage") if isinstance(inner, dict) else None
    if isinstance(stage, int):
        return stage
    named = re.search(r"z(?:ero)?[_-]?([0-3])", Path(name).name.lower())
    return int(named[1]) if named and not found else None


def _processes(found: dict[str, Any], nodes: int) -> int | None:
    count = found.get("num_processes")
    return count // nodes if isinstance(count, int) and count >= nodes else None


def gpus_of(call: Called) -> int | None:
    """Return the number of processes per machine that a launcher starts; None: it does not say."""
    for flag in ("nproc_per_node", "nproc-per-node", "num_processes", "num-processes", "num_gpus"):
        if (text := _value(call.words, flag)) and text.isdigit():
            count = int(text)
            return count // (nodes_of(call) or 1) if "processes" in flag else count
    if (text := call.environment.get("NPROC_PER_NODE")) and text.isdigit():
        return int(text)
    for name, text in call.environment.items():
        if name.endswith("_VISIBLE_DEVICES") and text and not unknowns(text):
            return len(text.split(","))
    return None


def nodes_of(call: Called) -> int:
    for flag in ("nnodes", "num_machines", "num_nodes"):
        if (text := _value(call.words, flag)) and text.isdigit():
            return int(text)
    return 1


def _value(words: list[str], flag: str) -> str | None:
    for n, word in enumerate(words):
        if word == f"--{flag}" and n + 1 < len(words):
            return words[n + 1]
        if word.startswith(f"--{flag}="):
            return word.partition("=")[2]
    return None
