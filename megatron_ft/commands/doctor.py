"""megatron-ft doctor: list what is installed, what training will use and what is missing; --check runs small tests."""

from __future__ import annotations

import importlib.metadata
import os
import platform
import sys
import time
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from megatron_ft.config.cli import Command, run_script
from megatron_ft.config.sections import Kernels, Numerics
from megatron_ft.engine import versions
from megatron_ft.errors import ConfigError
from megatron_ft.files import check_writable

if TYPE_CHECKING:
    from megatron_ft.models.machine import Machine


@dataclass
class Doctor:
    """Checks"""

    check: bool = False
    """also test this machine with small real runs: one line per run, five minutes at most"""
    check_report: str = "megatron-ft-doctor.txt"
    """with --check: file for the complete output, to paste into a bug report"""


COMMAND = Command(
    name="doctor",
    summary="list what is installed, what training will use and what is missing; --check runs small tests",
    sections=(Doctor,),
    examples=("megatron-ft doctor", "megatron-ft doctor --check"),
)

NEEDED = ("torch", "megatron-core", "numpy", "sentencepiece", "tokenizers", "safetensors", "pydantic")
"""Distributions that every command needs."""
TRIED = {
    "torch": "tested with 2.13, on one H200 with 2.11; for 2.10 to 2.12 the signatures of attention are tested",
    "megatron-core": f"tested with {' and '.join(versions.TRIED)}; other releases are refused",
}
"""Distribution -> its tested versions."""
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
"""Distribution -> its purpose."""


def run(options: Doctor) -> int:
    """Print the inventory, and with --check the results of the checks. Return 2 if a required package is missing, 1 if a check
    failed, else 0.
    """
    if options.check:
        check_writable("--check_report", Path(options.check_report).parent)
    elif options.check_report != Doctor.check_report:
        raise ConfigError("--check_report has an effect only with --check: add --check")
    listing = inventory()
    print(*listing, sep="\n", flush=True)
    if any(_version(name) is None for name in NEEDED):
        return 2
    if options.check:
        return check_machine(listing, Path(options.check_report))
    print("\nto test this machine: megatron-ft doctor --check")
    return 0


def inventory() -> list[str]:
    """Return lines that describe this machine, the installed packages and what training will use."""
    import megatron_ft

    lines = [
        f"megatron_ft {megatron_ft.__version__}, Python {platform.python_version()}, {platform.platform(terse=True)}",
        f"{os.cpu_count()} CPU cores, {_memory_gb():.0f} GB of memory",
        "",
    ]
    for name in NEEDED:
        tried = f"  ({TRIED[name]})" if name in TRIED else ""
        lines.append(f"  {name:20} {_version(name) or 'MISSING: pip install megatron_ft again'}{tried}")
    for name, purpose in OPTIONAL.items():
        lines.append(f"  {name:20} {_version(name) or f'not installed  (for {purpose})'}")
    if all(_version(name) for name in NEEDED):
        lines += ["", *(f"  {name:20} {choice}" for name, choice in choices())]
    return lines


def check_machine(listing: list[str], report: Path) -> int:
    """Run the checks, print a line for each as it ends, then a verdict; write all of it to the report. Return 1 if one failed, else 0."""
    from megatron_ft.doctor.checks import CHECKS
    from megatron_ft.doctor.runner import check_runner
    from megatron_ft.doctor.verdict import verdict, write_report

    width = max(len(check.name) for check in CHECKS)
    print(f"\n{len(CHECKS)} checks, up to five minutes in total; each is a small real run", flush=True)
    results, began = [], time.monotonic()
    with check_runner() as runner:
        for result in runner.results():
            print(result.line(width), flush=True)
            results.append(result)
    conclusion = verdict(results, time.monotonic() - began)
    write_report(report, listing, results, conclusion)
    print(f"\n{conclusion}\n{report}: the complete output, to paste into a bug report")
    return int(any(result.outcome == "fail" for result in results))


def choices() -> list[tuple[str, str]]:
    """Return (name, choice) for each thing that training on this machine will use with --bf16 --use_flash_attn."""
    from megatron_ft import device
    from megatron_ft.models.kernels import choose, machine

    here = machine()
    choice = choose(Kernels(use_flash_attn=True), Numerics(bf16=True), here)
    gpu = here.has_gpu
    return [
        ("device", device.describe()),
        ("processes", ("one per GPU" if gpu else "any number on this machine") + f", over {device.backend()}"),
        *choice.lines(),
        (
            "apex",
            "NVIDIA's" if here.apex else f"{here.why_not('apex')}  (its optimizer; without it torch's fused AdamW)",
        ),
        *([("gradient fusion", _gradient_fusion(here))] if gpu else []),
        ("precision", "fp32 (default), bf16, fp16"),
        *(("not used", reason) for reason in choice.reasons),
    ]


def _gradient_fusion(here: Machine) -> str:
    """Describe if weight gradients are added within the matrix product, and what that needs."""
    if here.accumulates:
        return "apex's extension"
    return f"{here.why_not('accumulates')}  (apex built with --cpp_ext --cuda_ext; without it two passes over each gradient)"


def _version(distribution: str) -> str | None:
    try:
        return importlib.metadata.version(distribution)
    except importlib.metadata.PackageNotFoundError:
        return None


def _memory_gb() -> float:
    return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / 1e9


if __name__ == "__main__":
    sys.exit(run_script(COMMAND, run))
