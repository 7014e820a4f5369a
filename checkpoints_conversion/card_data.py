"""The entries at the head of a model card, which the Hugging Face Hub reads. Only what is recorded is said."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import yaml

from megatron_ft.checkpoints.folder import TRAINED_ON, CheckpointConfig
from megatron_ft.files import read_json
from megatron_ft.models.activation_swap import swap_of

_REPOSITORY = re.compile(r"[\w.-]{1,96}/[\w.-]{1,96}")
"""owner/name, as the Hub takes them."""


def is_repository(name: str) -> bool:
    """Say if a name can be one of the Hub: a path of folders has more parts, or none."""
    return bool(_REPOSITORY.fullmatch(name)) and not (set(name.split("/")) & {".", ".."} or name.startswith(("-", ".")))


def front_matter(
    config: CheckpointConfig,
    folder: Path,
    library: str,
    base: str,
    settings: dict[str, Any],
    kind: str | None,
    lora: bool,
) -> str:
    """Return the entries as YAML between lines of dashes. folder: of the checkpoint. base: name of the base model, or a folder. kind: how
    the export is quantised. lora: it is an adapter."""
    trained = config.iteration != "release"
    entries: dict[str, Any] = {**(config.card or {}), "library_name": library, "pipeline_tag": "text-generation"}
    if is_repository(base):
        entries["base_model"] = base
        entries |= _relation(trained, kind, lora)
    if datasets := _datasets(folder):
        entries["datasets"] = datasets
    entries["tags"] = _tags(config, settings, kind, lora)
    return f"---\n{yaml.safe_dump(entries, sort_keys=False, allow_unicode=True, width=1000)}---\n"


def _relation(trained: bool, kind: str | None, lora: bool) -> dict[str, str]:
    """Return what the model is to its base, in the Hub's words."""
    if lora:
        return {"base_model_relation": "adapter"}
    if trained:
        return {"base_model_relation": "finetune"}
    return {"base_model_relation": "quantized"} if kind else {}


def _datasets(folder: Path) -> list[str]:
    """Return the names of the shards' sources that are names of the Hub."""
    path = folder / TRAINED_ON
    found = read_json(path) if path.is_file() else []
    entries = found if isinstance(found, list) else []
    names = {str(name) for entry in entries if isinstance(entry, dict) for name in entry.get("sources") or ()}
    return sorted(filter(is_repository, names))


def _tags(config: CheckpointConfig, settings: dict[str, Any], kind: str | None, lora: bool) -> list[str]:
    swap = swap_of(config.architecture)
    said = {
        "megatron-core": True,
        "conversational": bool(config.chat_format),
        "lora": lora,
        "distillation": bool(settings.get("teacher") or settings.get("teacher_logits")),
        str(swap.after) if swap else "": bool(swap),
        kind or "": bool(kind),
    }
    return [tag for tag, holds in said.items() if holds]
