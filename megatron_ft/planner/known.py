"""Known models and GPUs by name, and models from files."""

from __future__ import annotations

import os
import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from megatron_ft.checkpoints.folder import CONFIG, describe, find_checkpoint, read_config
from megatron_ft.config.hints import nearest
from megatron_ft.errors import ConfigError
from megatron_ft.files import read_json
from megatron_ft.models.architecture import Architecture
from megatron_ft.models.families import parse_hf_config
from megatron_ft.planner.published import MODELS


@dataclass(frozen=True)
class Gpu:
    """memory in GB (1e9 bytes), dense bf16 speed in TFLOP/s, link between GPUs of a node in GB/s per direction."""

    memory: float
    tflops: float
    link: float


GPUS: dict[str, Gpu] = {
    "a100-40gb": Gpu(42.4, 312, 300), "a100-80gb": Gpu(85.2, 312, 300), "h100-80gb": Gpu(85.5, 989, 450),
    "h200-141gb": Gpu(150.7, 989, 450), "b200-180gb": Gpu(191.5, 2250, 900), "mi300x-192gb": Gpu(206.1, 1307, 448),
    "l40s-48gb": Gpu(47.8, 362, 32), "a6000-48gb": Gpu(51.0, 155, 56), "rtx4090-24gb": Gpu(25.3, 165, 32),
    "rtx3090-24gb": Gpu(25.3, 71, 56),
}  # fmt: skip
"""Source: the manufacturers' data sheets; memory as the driver reports it."""


_SAME = re.compile(r"-(instruct|chat|base|hf|it)\b")
"""Parts of names of models that differ in their weights only."""


def architecture(model: str) -> Architecture:
    """Return the architecture of a known name, a Hugging Face config.json or its folder, or a checkpoint.

    A file or folder comes before other spellings of a name: meta-llama/Llama-3.1-8B-Instruct, llama3.1-8, any case. Raise ConfigError
    with the known names.
    """
    path = Path(model)
    if model.lower() not in MODELS and (path.exists() or _is_place(path)):
        return _read(path)
    return parse_hf_config(MODELS[_only(model, MODELS, "model")])[1]


def _is_place(path: Path) -> bool:
    """Return whether this can only be a path: a file name, more than owner/name, or beside other files."""
    return path.suffix == ".json" or len(path.parts) > 2 or (len(path.parts) == 2 and path.parent.exists())


def _read(path: Path) -> Architecture:
    if not path.exists():
        raise ConfigError(f"model {path}: no such file or folder; a name would be one of {_listed(MODELS)}")
    file = path / CONFIG if path.is_dir() else path
    if not file.is_file():
        return describe(find_checkpoint(path)).architecture
    config = read_json(file)
    if isinstance(config, dict) and "architecture" in config:
        return read_config(file.parent).architecture
    return parse_hf_config(config)[1]


CPU = "cpu"
"""In place of a GPU: this machine's processors and memory. How fast they are is not known."""


def gpu(name: str) -> Gpu:
    """Return a known GPU, or this machine's memory. Raise ConfigError as gpu_name."""
    if (whole := gpu_name(name)) == CPU:
        return Gpu(os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / 1e9, 1, 1)
    return GPUS[whole]


def gpu_name(name: str) -> str:
    """Return the whole name of a known GPU, for any beginning that no other has. Raise ConfigError with the known names."""
    return _only(name, {**GPUS, CPU: None}, "--gpu")


def _plain(name: str) -> str:
    """Return a name without what spellings of it differ in: owner, case, hyphens, kind of fine-tuning."""
    last = _SAME.sub("", name.rpartition("/")[2].lower()).removeprefix("meta-")
    return re.sub(r"[-_ ]", "", last)


def _only(name: str, known: Mapping[str, Any], kind: str) -> str:
    """Return the known name that is spelt like `name`, or the only one that begins so. Raise ConfigError without one."""
    plain = {_plain(one): one for one in known}
    begins = [whole for start, whole in plain.items() if start.startswith(_plain(name))]
    if _plain(name) in plain or len(begins) == 1:
        return plain.get(_plain(name), begins[0])
    if _plain(name) and begins:
        raise ConfigError(f"{kind} {name} may be one of {_listed(begins)}: give more of the name")
    hint = nearest(name.lower(), known)
    what = "no such file, and no known model of this name" if kind == "model" else "not known"
    raise ConfigError(f"{kind} {name}: {what}{hint}; known: {_listed(known)}")


def _listed(names: Iterable[str]) -> str:
    """Return names as text, those that begin alike together: llama2-7b/13b."""
    found: dict[str, list[str]] = {}
    for name in names:
        found.setdefault(name.partition("-")[0], []).append(name.partition("-")[2])
    return ", ".join(f"{start}-{'/'.join(ends)}".rstrip("-") for start, ends in found.items())
