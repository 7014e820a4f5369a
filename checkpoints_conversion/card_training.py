"""The rows of a model card about its training: hyper-parameters and losses, as the run has recorded them."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import yaml

from megatron_ft.checkpoints.folder import SETTINGS

METRICS = "metrics.jsonl"
SHOWN = {
    "sequence length": "seq_length",
    "global batch size": "global_batch_size",
    "steps": "train_iters",
    "learning rate": "lr",
    "smallest learning rate": "min_lr",
    "schedule": "lr_decay_style",
    "warm-up steps": "lr_warmup_iters",
    "weight decay": "weight_decay",
    "Adam beta1": "adam_beta1",
    "Adam beta2": "adam_beta2",
    "Adam epsilon": "adam_eps",
    "gradient clipping": "clip_grad",
    "hidden dropout": "hidden_dropout",
    "attention dropout": "attention_dropout",
    "loss weight of other tokens": "scalar_loss_mask",
    "packed rows": "packing",
    "LoRA rank": "lora_rank",
    "LoRA alpha": "lora_alpha",
    "LoRA dropout": "lora_dropout",
    "base of the adapters": "base_precision",
    "weight of the distillation": "kd_weight",
    "weight of the cross entropy": "ce_weight",
    "temperature of the distillation": "kd_temperature",
    "seed": "seed",
}
"""Row -> flag of finetune."""
_ONLY_WITH = {"kd_weight": "teacher", "ce_weight": "teacher", "kd_temperature": "teacher", "lora_alpha": "lora_rank",
              "lora_dropout": "lora_rank", "base_precision": "lora_rank"}  # fmt: skip
_UNSAID: tuple[Any, ...] = (None, False, [], "", 0.0)
"""Values that say that something is off. A seed of 0 is one too, but a value."""


def settings_of(folder: Path) -> dict[str, Any]:
    """Return the settings of the run that wrote a checkpoint, by flag; {} if none are recorded."""
    try:
        read = yaml.safe_load((folder / SETTINGS).read_text(encoding="utf-8"))
    except (OSError, UnicodeDecodeError, yaml.YAMLError, ValueError):
        return {}
    sections = [one for one in read.values() if isinstance(one, dict)] if isinstance(read, dict) else []
    return {name: value for section in sections for name, value in section.items()}


def training_rows(folder: Path, settings: dict[str, Any]) -> dict[str, str]:
    """Return name -> value of what is recorded. folder: of the checkpoint."""
    rows = {label: _in_words(settings[name]) for label, name in SHOWN.items() if _is_said(settings, name)}
    precision = next((name for name in ("bf16", "fp16") if settings.get(name)), None)
    if settings:
        rows["precision"] = precision or "fp32"
    return rows | _losses(folder, settings)


def _is_said(settings: dict[str, Any], name: str) -> bool:
    other = _ONLY_WITH.get(name)
    needed = (
        other is None or settings.get(other) not in _UNSAID or (other == "teacher" and settings.get("teacher_logits"))
    )
    value = settings.get(name)
    return bool(needed) and (value not in _UNSAID or (name == "seed" and value is not None))


def _in_words(value: Any) -> str:
    return "yes" if value is True else f"{value:g}" if isinstance(value, float) else str(value)


def _losses(folder: Path, settings: dict[str, Any]) -> dict[str, str]:
    """Return the last losses up to the checkpoint, from the metrics of its run."""
    found: dict[str, str] = {}
    names = {"train/loss": "loss of training", "eval/loss": "loss of validation"}
    lines = _metrics(folder, settings)
    saved = [i for i, line in enumerate(lines) if Path(str(line.get("checkpoint", ""))).name == folder.name]
    for line in lines[: saved[-1]] if saved else []:  # metrics that do not name it are of another run
        found |= {
            names[key]: f"{line[key]:.4g} at step {line.get('iteration')}"
            for key in names
            if isinstance(line.get(key), float)
        }
    return found


def _metrics(folder: Path, settings: dict[str, Any]) -> list[dict[str, Any]]:
    """Return the lines of metrics.jsonl: in the folder that the settings name, else beside the checkpoint."""
    named = settings.get("run_dir")
    for place in (Path(str(named)) if named else None, folder.parent):
        if place and (place / METRICS).is_file():
            return [line for line in map(_line, (place / METRICS).read_text(errors="replace").splitlines()) if line]
    return []


def _line(text: str) -> dict[str, Any] | None:
    """Return a line's values; None for one that was cut off when the run was killed."""
    try:
        found = json.loads(text)
    except ValueError:
        return None
    return found if isinstance(found, dict) else None
