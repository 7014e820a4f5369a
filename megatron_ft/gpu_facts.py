"""Facts about GPUs, driver and torch's build for `megatron-ft doctor --check`; nothing else uses them."""

from __future__ import annotations

import contextlib
import subprocess
import traceback
import warnings
from collections.abc import Iterator
from typing import Any

from megatron_ft import device


def hardware_seen() -> list[str]:
    """Return signs of NVIDIA GPUs that do not depend on torch: device files that open, what nvidia-smi lists. Empty: none."""
    try:
        done = subprocess.run(["nvidia-smi", "-L"], capture_output=True, text=True, timeout=30)
        listed = [line for line in done.stdout.splitlines() if line.startswith("GPU ")]
    except (OSError, subprocess.SubprocessError):
        listed = []
    return device.device_files() + listed


def wheel_architectures() -> list[str]:
    """Return what torch's kernels were compiled for: sm_80 (one GPU generation, from that minor release on), compute_90 (any later)."""
    import torch

    return torch.cuda.get_arch_list()


def wheel_version() -> str | None:
    """Return the CUDA version with which the installed torch was built, as "12.8"; None for a CPU build."""
    import torch

    return torch.version.cuda


def driver_version() -> str | None:
    """Return the newest CUDA version that the installed driver supports, as "12.4"; None without a driver."""
    import ctypes

    try:
        library = ctypes.CDLL("libcuda.so.1")
    except OSError:
        return None
    number = ctypes.c_int(0)
    failed = library.cuDriverGetVersion(ctypes.byref(number))
    return None if failed or not number.value else f"{number.value // 1000}.{number.value % 1000 // 10}"


def gpus() -> list[tuple[str, tuple[int, int]]]:
    """Return (name, compute capability) of each GPU that this process may use."""
    import torch

    if not device.has_gpu():
        return []
    numbers = range(torch.cuda.device_count())
    return [(torch.cuda.get_device_name(number), torch.cuda.get_device_capability(number)) for number in numbers]


def backend_version() -> str:
    """Return the communication library, for people: "NCCL 2.27.3" on GPUs, "gloo" on a CPU."""
    import torch

    return f"NCCL {'.'.join(map(str, torch.cuda.nccl.version()))}" if device.has_gpu() else device.backend()


@contextlib.contextmanager
def host_waits() -> Iterator[list[list[traceback.FrameSummary]]]:
    """Yield a list that gets the stack (traceback.FrameSummary, outermost first) of each operation that makes the host wait for the GPU.

    torch warns of them itself (set_sync_debug_mode). What the backward pass does in C++ is reported from the line that started it.
    """
    import torch

    stacks: list[list[traceback.FrameSummary]] = []

    def seen(message: Warning | str, *_: Any, **__: Any) -> None:
        if "synchronizing CUDA operation" in str(message):
            stacks.append(traceback.extract_stack()[:-1])

    with warnings.catch_warnings():
        warnings.simplefilter("always")
        warnings.showwarning = seen
        torch.cuda.set_sync_debug_mode("warn")
        try:
            yield stacks
        finally:
            torch.cuda.set_sync_debug_mode("default")
