"""Capabilities of this machine: compute capability of the GPU, attention kernels, compilers. Packages are imported and tested.

An installed package may fail to import (built for another torch), and an imported one may fail to run (built for another GPU). Every test
returns the reason of a failure, for `doctor` and the log. kernels.py chooses by these results.
"""

from __future__ import annotations

import functools
import importlib
import inspect
import os
import shutil
import sysconfig
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING

from megatron_ft import device

if TYPE_CHECKING:
    import torch

FLASH_CAPABILITY = (8, 0)
"""Compute capability from which flash kernels (flash-attn 2, torch's) run, and from which there are hardware units for bf16."""


@dataclass(frozen=True)
class Machine:
    """The properties of this machine on which choices depend. The defaults are a machine without a GPU."""

    has_gpu: bool = False
    capability: tuple[int, int] = (9, 0)
    """Compute capability of the GPU."""
    flash_attn: bool = False
    varlen: frozenset[str] = frozenset()
    """Arguments of torch's varlen_attn, empty where there is none (before torch 2.10)."""
    transformer_engine: bool = False
    apex: bool = False
    """NVIDIA's, with its optimizers; another project of that name is on the package index"""
    accumulates: bool = False
    """apex's extension that adds a weight's gradient to its buffer within the matrix product"""
    compiles: bool = False
    """torch.compile makes GPU kernels: Triton, a C compiler and Python.h are there"""
    lacks: dict[str, str] = field(default_factory=dict)
    """Field -> why it is not so."""

    @property
    def flash(self) -> bool:
        """Return whether flash kernels run on this GPU."""
        return self.has_gpu and self.capability >= FLASH_CAPABILITY

    def why_not(self, name: str) -> str:
        """Return why the field `name` is not so."""
        return self.lacks.get(name, "not installed")


@functools.cache
def machine() -> Machine:
    """Return this one. The first call on a GPU imports what is there and tries it, which takes seconds."""
    if not device.has_gpu():
        return Machine()
    probes: dict[str, Callable[[], str | None]] = {
        "flash_attn": try_flash_attn,
        "transformer_engine": functools.partial(try_import, "transformer_engine.pytorch.optimizers"),
        "apex": functools.partial(try_import, "apex.optimizers"),
        "accumulates": functools.partial(try_import, device.GRADIENT_EXTENSION),
        "compiles": try_compile,
    }
    lacks = {name: why for name, probe in probes.items() if (why := probe()) is not None}
    found = {name: name not in lacks for name in probes}
    return Machine(True, device.capability(), varlen=varlen_arguments(), lacks=lacks, **found)


def glance() -> Machine:
    """Return what is known without using the GPU, for the process that starts the others. No kernel is tested."""
    has_gpu = device.has_gpu()
    found = has_gpu and try_import("transformer_engine.pytorch.optimizers") is None
    return Machine(has_gpu=has_gpu, transformer_engine=found)


def try_import(module: str) -> str | None:
    """Import a module; return why it cannot be, None where it can."""
    try:
        importlib.import_module(module)
    except ModuleNotFoundError as error:
        top = module.partition(".")[0]
        return "not installed" if error.name == top else f"incomplete: {error}"
    except Exception as error:  # a library built for another torch fails in many ways
        return f"installed but cannot be imported ({_first_line(error)})"
    return None


def try_flash_attn() -> str | None:
    """Run flash-attn's variable-length attention once, forward and backward; return why it cannot be used, None where it can."""
    if why := try_import("flash_attn"):
        return why
    if device.capability() < FLASH_CAPABILITY:
        return f"needs compute capability 8.0, this GPU has {dotted(device.capability())}"
    import torch
    from flash_attn import flash_attn_varlen_func

    here = device.current_device()
    try:
        query, key, value = (
            torch.ones(8, 2, 64, dtype=torch.bfloat16, device=here, requires_grad=True) for _ in range(3)
        )
        bounds = torch.arange(0, 9, 4, dtype=torch.int32, device=here)
        flash_attn_varlen_func(query, key, value, bounds, bounds, 4, 4, causal=True).sum().backward()
        device.synchronize()
    except Exception as error:
        return f"installed but does not run on this GPU ({_first_line(error)})"
    return None


def try_compile() -> str | None:
    """Compile one small kernel and run it. Return why torch.compile cannot be used; None if it can."""
    if why := try_import("triton"):
        return f"Triton is {why}"
    if not _c_compiler():
        return "there is no C compiler: install gcc, or name one in CC"
    if not (Path(sysconfig.get_paths()["include"]) / "Python.h").is_file():
        return "Python.h is missing: install Python's development files (python3-dev)"
    import torch

    try:
        torch.compile(_doubled, dynamic=True)(torch.ones(64, device=device.current_device()))
        device.synchronize()
    except Exception as error:
        return f"a first small kernel failed ({_first_line(error)})"
    return None


def _doubled(x: torch.Tensor) -> torch.Tensor:
    return x * 2 + 1


def _c_compiler() -> str | None:
    """Return the compiler that Triton would use: CC, else one on the path."""
    named = os.environ.get("CC")
    return (
        shutil.which(named.split()[0]) if named else next(filter(None, map(shutil.which, ("gcc", "clang", "cc"))), None)
    )


@functools.cache
def varlen_arguments() -> frozenset[str]:
    """Return the names of varlen_attn's arguments; they grew from release to release of torch."""
    try:
        from torch.nn.attention.varlen import varlen_attn
    except ImportError:
        return frozenset()
    return frozenset(inspect.signature(varlen_attn).parameters)


def dotted(capability: tuple[int, int]) -> str:
    return ".".join(map(str, capability))


def _first_line(error: Exception) -> str:
    return (str(error).strip().splitlines() or [type(error).__name__])[0][:200]
