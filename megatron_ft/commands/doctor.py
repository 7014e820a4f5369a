"""megatron-ft doctor: what this machine has, what training will use, and what is missing for what. To paste into a bug report."""

from __future__ import annotations

import importlib.metadata
import os
import platform
import sys
from dataclasses import dataclass

from megatron_ft.config.cli import Command, run_script
from megatron_ft.config.sections import Kernels, Numerics


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
    "flash-attn": "--use_flash_attn on packed rows; without it torch's own flash attention",
    "transformer-engine": "its optimizer; without it torch's fused AdamW",
    "psutil": "saving checkpoints",
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
    """What training on this machine will use with --bf16 --use_flash_attn, one line a decision."""
    from megatron_ft import device
    from megatron_ft.models.kernels import choose, machine

    here = machine()
    choice = choose(Kernels(use_flash_attn=True), Numerics(bf16=True), here)
    gpu = here.has_gpu
    return [
        ("device", device.describe()),
        ("processes", ("one a GPU" if gpu else "any number on this machine") + f", over {device.backend()}"),
        *choice.lines(),
        ("apex", "NVIDIA's" if here.apex else "not installed  (its optimizer; without it torch's fused AdamW)"),
        ("precision", "fp32 (default), bf16, fp16"),
        *(("not used", reason) for reason in choice.reasons),
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
