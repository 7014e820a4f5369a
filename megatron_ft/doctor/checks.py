"""The list of all checks, in the order in which they run. To add one: write its function and add a line here.

A function takes a folder for its files (removed at the end) and returns a Found. It runs in a separate process, so it may crash or
hang. It is imported by name in that process: this file imports neither torch nor the engine.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from importlib import import_module
from pathlib import Path

from megatron_ft.doctor.result import Found


@dataclass(frozen=True)
class Check:
    name: str
    """Name in the report."""
    function: str
    """module:function; a module name without dots is in this package."""
    seconds: float = 120.0
    """Time limit after which the check counts as hanging."""

    @property
    def needs_engine(self) -> bool:
        """Return True if the check needs megatron-core; the checks of the machine run without it."""
        return not self.function.partition(":")[0].endswith("machine")

    def load(self) -> Callable[[Path], Found]:
        module, function = self.function.split(":")
        return getattr(import_module(module if "." in module else f"megatron_ft.doctor.{module}"), function)


CHECKS = (
    Check("driver and torch", "machine:driver", 60),
    Check("compute capability", "machine:capability", 60),
    Check("compiler", "machine:compiler"),
    Check("communication", "several:communication"),
    Check("attention by sample", "attention:by_sample"),
    Check("torch varlen attention", "attention:torch_varlen"),
    Check("flash-attn", "attention:flash_attn"),
    Check("bf16 steps", "training:plain_steps", 180),
    Check("dropout masks", "training:masks"),
    Check("bf16 steps, LIMA dropout", "training:lima_steps", 180),
    Check("fp16 from its first scale", "resuming:fp16", 180),
    Check("layouts TP2, SP, DP2", "layouts:tensor_and_data", 180),
    Check("layout PP2", "layouts:pipeline", 180),
    Check("layout PP2 interleaved", "layouts:interleaved", 180),
    Check("clean exit", "jobs:clean_exit", 180),
    Check("a rank is killed", "jobs:killed_rank", 180),
    Check("save and resume", "resuming:resume", 240),
    Check("save in background", "resuming:resume_async", 240),
    Check("host waits", "efficiency:host_waits", 180),
    Check("recompilations", "efficiency:recompilations", 240),
    Check("memory against plan", "efficiency:memory", 180),
)
