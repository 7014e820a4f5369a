"""Checks of the installation and the hardware. The judge_ functions are pure functions of facts."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from megatron_ft import device, gpu_facts
from megatron_ft.doctor.result import Found, failed, passed, skipped
from megatron_ft.models.machine import FLASH_CAPABILITY, Machine, machine

ON_CPU = "torch computes on the CPU here"


@dataclass(frozen=True)
class DriverFacts:
    """The facts that determine if torch can use the GPU."""

    seen: tuple[str, ...]
    """Signs of a GPU: device files, lines of nvidia-smi."""
    wheel: str | None
    """CUDA version that torch was built with."""
    driver: str | None
    """Newest CUDA version that the driver supports."""
    usable: bool
    """torch can compute on a GPU."""
    hidden: bool = False
    """GPUs are hidden on purpose."""


def driver(folder: Path) -> Found:
    """Check that torch can use the GPU. This check is the first, because all others depend on it."""
    seen = tuple(gpu_facts.hardware_seen())
    return judge_driver(
        DriverFacts(seen, gpu_facts.wheel_version(), gpu_facts.driver_version(), device.has_gpu(), device.hidden())
    )


def judge_driver(facts: DriverFacts) -> Found:
    """Judge the driver. Minor releases of one CUDA major version are compatible (NVIDIA's minor version compatibility)."""
    if facts.hidden and not facts.usable:
        return skipped("GPUs are hidden (MEGATRON_FT_DEVICE=cpu, or an empty CUDA_VISIBLE_DEVICES): the CPU is tested")
    if not facts.seen and not facts.usable:
        return skipped("no NVIDIA GPU found (no /dev/nvidia0, none in nvidia-smi -L): the CPU is tested")
    both = f"driver supports CUDA {facts.driver}, torch was built for {f'CUDA {facts.wheel}' if facts.wheel else 'the CPU'}"
    where = facts.seen[0] if facts.seen else "a GPU"
    if facts.driver is None:
        return failed(f"{where} exists, but no driver responds (libcuda.so.1): install or load NVIDIA's driver")
    if facts.wheel is None:
        return failed(f"{where} exists, but {both}: install torch's build for CUDA {facts.driver}")
    if _release(facts.driver)[0] < _release(facts.wheel)[0]:
        return failed(
            f"{both}: the driver is too old; update it, or install a torch built for CUDA {facts.driver} or earlier"
        )
    if not facts.usable:
        return failed(
            f"{both}, but torch finds no GPU: run nvidia-smi; check CUDA_VISIBLE_DEVICES and the container's --gpus option"
        )
    return passed(both)


def _release(version: str) -> tuple[int, ...]:
    return tuple(map(int, version.split(".")))


def capability(folder: Path) -> Found:
    return judge_capability(gpu_facts.gpus(), gpu_facts.wheel_architectures() if device.has_gpu() else [])


def judge_capability(gpus: Sequence[tuple[str, tuple[int, int]]], compiled_for: Sequence[str]) -> Found:
    """Judge the GPUs. gpus: (name, compute capability) of each. compiled_for: see gpu_facts.wheel_architectures."""
    if not gpus:
        return skipped(ON_CPU)
    kinds = dict(gpus)
    counts = {name: sum(other == name for other, _ in gpus) for name in kinds}
    listed = ", ".join(f"{counts[name]} x {name} (sm{major}{minor})" for name, (major, minor) in kinds.items())
    if foreign := [name for name, found in kinds.items() if not any(_runs(one, found) for one in compiled_for)]:
        return failed(
            f"{listed}: this torch has no kernels for {foreign[0]} (it has {' '.join(compiled_for)}); install another build"
        )
    if any(found < FLASH_CAPABILITY for found in kinds.values()):
        return failed(
            f"{listed}: flash kernels need sm80 (A100) or later: attention runs sample by sample over packed rows, which is slow"
        )
    return passed(listed + ("; the slowest one limits the speed" if len(kinds) > 1 else ""))


def _runs(compiled: str, capability: tuple[int, int]) -> bool:
    """Return True if code for sm_86 or compute_90 runs on a GPU: sm_ within its generation, compute_ on any later one."""
    kind, _, number = compiled.rstrip("af").partition("_")
    major, minor = divmod(int(number), 10)
    return (major, minor) <= capability and (kind == "compute" or major == capability[0])


def compiler(folder: Path) -> Found:
    """Check Triton, a C compiler and Python.h, as `finetune` finds them; then the results of a compiled kernel."""
    found = judge_compiler(machine())
    return _compile_one() if found.outcome == "pass" else found


def judge_compiler(here: Machine) -> Found:
    """Judge the compiler."""
    if not here.has_gpu:
        return skipped("kernels are compiled on GPUs only")
    if not here.compiles:
        return failed(f"{here.why_not('compiles')}; without it torch's operations run separately, which is slower")
    return passed("Triton, C compiler and Python.h")


def _compile_one() -> Found:
    import torch

    def silu_times(x: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
        return torch.nn.functional.silu(x) * y

    x, y = torch.randn(2, 1000, device=device.current_device()).unbind()
    apart = float((torch.compile(silu_times)(x, y) - silu_times(x, y)).abs().max())
    if not apart < 1e-5:
        return failed(
            f"a compiled kernel differs by {apart:.1e} from torch's operations: train with --no_fused_kernels"
        )
    return passed(f"Triton, C compiler and Python.h; a compiled kernel differs by {apart:.0e} from torch's operations")
