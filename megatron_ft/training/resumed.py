"""The differences between the settings of a resumed run and those of the run that was stopped."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import yaml

from megatron_ft.config.fields import section_name
from megatron_ft.config.settings import TrainingSettings
from megatron_ft.log import logger

log = logger("finetune")

ROWS = ("data_path", "split", "seq_length", "packing", "over_long", "data_weights", "data_weights_by", "seed")
"""Settings of Data that decide which samples the rows of a run hold, and in which order."""


def log_changes(saved: Path, settings: TrainingSettings) -> None:
    """Log which settings differ from those of the run that was stopped. saved: its training.yaml.

    A change of the rows that follow is a warning. Other changes are one line.
    """
    before, data = _settings_of(saved), settings.data
    for name in ROWS:
        was = before.get("data", {}).get(name, getattr(data, name))
        if was != getattr(data, name):
            log.warning(
                f"resuming with --{name} {getattr(data, name)}, saved with {was}: the rows that follow are other "
                f"ones, and some samples may come twice or not at all"
            )
    changed = [
        f"--{name} {was} -> {getattr(section, name)}"
        for section in (settings.batch, settings.parallel, settings.optimizer, settings.numerics)
        for name, was in before.get(section_name(type(section)), {}).items()
        if getattr(section, name, was) != was
    ]
    if changed:
        log.info(f"changed since the checkpoint: {', '.join(changed)}")


def _settings_of(saved: Path) -> dict[str, dict[str, Any]]:
    """Return the settings by section; {} where there are none, or they are damaged, which the digests show later."""
    try:
        found = yaml.safe_load(saved.read_text(encoding="utf-8"))
    except (OSError, UnicodeDecodeError, yaml.YAMLError):
        return {}
    found = found if isinstance(found, dict) else {}
    return {name: section for name, section in found.items() if isinstance(section, dict)}
