"""megatron-ft doctor: what this machine has, what training will use, and what is missing for what. To paste into a bug report."""

from __future__ import annotations

import importlib.metadata
import importlib.util
import os
import platform
import sys
from dataclasses import dataclass

from megatron_ft.config.cli import Command, run_script


@dataclass
class Doctor:
    """Nothing to choose"""


COMMAND = Command(
    name="doctor",
    summary="what is installed, what will be used, what is missing for what",
    sections=(Doctor,),
    examples=("megatron-ft doctor",),
)

NEEDED = ("torch", "megatron-core", "numpy", "sentencepiece", "tokenizers", "safetensors", "pydantic")
"""Distributions without which nothing works."""
OPTIONAL = {
    "transformers": "checking exports (demo, verify)",
    "tensorboard": "--tensorboard_dir",
    "wandb": "--wandb_logger",
    "pyarrow": "reading parquet",
    "rensa": "dropping near duplicates",
    "flash-attn": "--use_flash_attn",
    "transformer-engine": "its optimizer",
}
"""Distribution -> what it is for."""


def run(_: Doctor) -> int:
    """Print the report; 2 where something that is needed is missing."""
    import megatron_ft

    print(f"megatron_ft {megatron_ft.__version__}, Python {platform.python_version()}, {platform.platform(terse=True)}")
    print(f"{os.cpu_count()} CPU cores, {_memory_gb():.0f} GB of memory\n")
    missing = [name for name in NEEDED if _version(name) is None]
    for name in NEEDED:
        print(f"  {name:20} {_version(name) or 'MISSING: pip install megatron_ft again'}")
    for name, purpose in OPTIONAL.items():
        print(f"  {name:20} {_version(name) or 'not installed'}{'' if _version(name) else f'  (for {purpose})'}")
    if not missing:
        print()
        for name, choice in choices():
            print(f"  {name:20} {choice}")
    return 2 if missing else 0


def choices() -> list[tuple[str, str]]:
    """What training on this machine will use, one line a decision."""
    from megatron_ft import device

    gpu = device.has_gpu()
    apex = importlib.util.find_spec("apex") is not None and importlib.util.find_spec("apex.optimizers") is not None
    engine = importlib.util.find_spec("transformer_engine") is not None
    return [
        ("device", device.describe()),
        ("processes", ("one a GPU" if gpu else "any number on this machine") + f", over {device.backend()}"),
        ("attention", "torch scaled_dot_product_attention, each packed sample on its own"),
        ("norms", "torch"),
        ("optimizer", "Transformer Engine" if engine else "apex" if apex else "torch's fused AdamW"),
        ("precision", "fp32 (default), bf16"),
    ]


def _version(distribution: str) -> str | None:
    try:
        return importlib.metadata.version(distribution)
    except importlib.metadata.PackageNotFoundError:
        return None


def _memory_gb() -> float:
    return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / 1e9


if __name__ == "__main__":
    sys.exit(run_script(COMMAND, run))
