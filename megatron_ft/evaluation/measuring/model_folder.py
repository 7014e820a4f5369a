"""What kind of folder a model is in, and which packages measuring it needs. Without torch."""

from __future__ import annotations

from collections.abc import Mapping
from importlib.util import find_spec
from pathlib import Path

from megatron_ft.checkpoints.folder import CONFIG, TRACKER, describe, find_checkpoint, hf_entries, is_export
from megatron_ft.errors import CheckpointError, ConfigError


def stored_bits(folder: Path, backend: str) -> int | None:
    """Return the bits of a model that a backend loads quantised, because it is stored so; None for one that is not.

    Raise CheckpointError for a kind of quantisation that cannot be measured.
    """
    if not is_export(folder):
        _check_checkpoint(folder)
        return 4 if describe(find_checkpoint(folder)).quantization else None
    entry = hf_entries(folder).get("quantization_config")
    if entry is None or backend == "engine":  # which dequantises what it reads
        return None
    entry = entry if isinstance(entry, Mapping) else {}
    method = entry.get("quant_method")
    if method != "bitsandbytes":
        raise CheckpointError(
            f"{folder} is quantised by {method}: give the model before quantisation, or one of bitsandbytes"
        )
    return 4 if entry.get("load_in_4bit") else 8


def _check_checkpoint(folder: Path) -> None:
    if not any((folder / name).exists() for name in (TRACKER, CONFIG)):
        raise CheckpointError(
            f"{folder} is neither a Hugging Face model nor a checkpoint: it has no {CONFIG} and no {TRACKER}; give the folder with them"
        )


def check_installed(bits: list[int]) -> None:
    """Raise ConfigError for a package that a configuration needs, with the way out. Nothing is imported."""
    few = ",".join(str(number) for number in bits if number >= 16) or "16"
    needed = {"transformers": "", "accelerate": ""} | ({"bitsandbytes": "8 and 4"} if min(bits) < 16 else {})
    for name, which in needed.items():
        if find_spec(name) is None:
            what = f"--bits {which} with transformers" if which else "--backend transformers"
            out = f"give --bits {few}, or --backend engine" if which else "give --backend engine"
            raise ConfigError(f"{what} needs {name}, which is not installed: pip install {name}, or {out}")
