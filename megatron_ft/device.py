"""The device on which a rank computes, and facts about it.

Only this file, gpu_facts.py and engine/cpu_stand_in.py contain the words cuda and gloo. Models, data and training are in other modules.
"""

from __future__ import annotations

import glob
import os
import re
import socket
from typing import TYPE_CHECKING

from megatron_ft.errors import ConfigError
from megatron_ft.wording import counted

if TYPE_CHECKING:
    import torch
    from torch.distributed import Store


CPU = {"MEGATRON_FT_DEVICE": "cpu", "CUDA_VISIBLE_DEVICES": "", "OMP_NUM_THREADS": "1"}
"""Environment of a process that computes on the CPU, whatever its machine has. One thread: several processes share the cores."""


def choose_cpu() -> None:
    """Compute on the CPU, in this process and in those that it starts. Call before torch is imported."""
    os.environ.update(CPU)


def has_gpu() -> bool:
    """Return whether this process computes on a GPU. MEGATRON_FT_DEVICE=cpu makes it False even if there is one."""
    import torch

    return os.environ.get("MEGATRON_FT_DEVICE", "") != "cpu" and torch.cuda.is_available()


HOST_BACKEND = "gloo"
"""The torch.distributed backend for objects of the hosts, on every device; its processes wait without using a core."""


def backend() -> str:
    """Return the torch.distributed backend for the device: nccl on a GPU, gloo on a CPU."""
    return "nccl" if has_gpu() else "gloo"


def current_device() -> torch.device:
    """Return the torch.device of this rank's tensors."""
    import torch

    return torch.device("cuda", torch.cuda.current_device()) if has_gpu() else torch.device("cpu")


def describe() -> str:
    """Return one line with the device on which this process computes."""
    import torch

    if has_gpu():
        return f"{torch.cuda.get_device_name()} (nccl)"
    return f"CPU, {counted(torch.get_num_threads(), 'thread')} a process (gloo)"


def gpu_name() -> str | None:
    """Return the name of the GPU by its driver; None on a CPU."""
    import torch

    return torch.cuda.get_device_name() if has_gpu() else None


def capability() -> tuple[int, int]:
    """Return the compute capability of the GPU as (major, minor). There must be one."""
    import torch

    return torch.cuda.get_device_capability()


GRADIENT_EXTENSION = "fused_weight_gradient_mlp_cuda"
"""The module of apex (built with --cpp_ext --cuda_ext) that megatron-core asks for to fuse gradient accumulation."""


def check_usable() -> None:
    """Raise ConfigError if this machine has a GPU that torch cannot use: training would use the CPU without a message."""
    import torch

    if has_gpu() or hidden() or not (driver := installed_driver()):
        return
    wheel = f"torch {torch.__version__}"
    if torch.version.cuda is None:
        why = f"{wheel} is a build for CPUs: install torch's CUDA build"
    else:
        why = (
            f"{wheel} was built for CUDA {torch.version.cuda}, and the driver may be too old for it (nvidia-smi shows which CUDA it "
            f"knows): update the driver, or install a torch for an older CUDA"
        )
    raise ConfigError(
        f"this machine has an NVIDIA GPU (driver {driver}) that torch cannot use. {why}; or set MEGATRON_FT_DEVICE=cpu to compute on "
        f"the CPU"
    )


def hidden() -> bool:
    """Return whether GPUs are hidden on purpose, by MEGATRON_FT_DEVICE or CUDA_VISIBLE_DEVICES."""
    return os.environ.get("MEGATRON_FT_DEVICE") == "cpu" or os.environ.get("CUDA_VISIBLE_DEVICES", "0") in ("", "-1")


def may_use_driver() -> bool:
    """Return whether a process of this machine may use a GPU's driver: it cannot be forked then. Without torch."""
    return not hidden() and any(map(os.path.exists, ("/dev/nvidiactl", "/dev/kfd")))  # NVIDIA's, AMD's


_DRIVER = "/proc/driver/nvidia/version"
_NODES = "/dev/nvidia[0-9]*"


def installed_driver() -> str | None:
    """Return the version of NVIDIA's driver where this process may open one of its GPUs; None where there is none."""
    if not device_files():
        return None
    try:
        with open(_DRIVER) as file:
            found = re.search(r"\b\d+\.\d+(\.\d+)?\b", file.readline())
    except OSError:
        found = None
    return found[0] if found else "of an unknown version"


def device_files() -> list[str]:
    """Return the files of NVIDIA GPUs that this process may open."""
    return sorted(filter(_opens, glob.glob(_NODES)))


def _opens(path: str) -> bool:
    """Return whether this process may open the device file: a SLURM job without GPUs sees the file but may not open it."""
    try:
        os.close(os.open(path, os.O_RDWR | os.O_CLOEXEC))
    except OSError:
        return False
    return True


def order_streams() -> None:
    """Make kernels start in the order in which they were queued. The overlap of communication in tensor parallelism depends on this.

    The driver reads the variable when a process first uses its GPU; the engine warns if it is not set. A value that the user has set is
    kept.
    """
    os.environ.setdefault("CUDA_DEVICE_MAX_CONNECTIONS", "1")


def select(local_rank: int) -> None:
    """Bind this process to its GPU, by its rank on the machine. Do nothing on a CPU.

    If each process sees only its own GPUs, as with `srun --gpus-per-task=1`, they are numbered from 0 in every process. Raise ConfigError
    if there is no GPU for this rank.
    """
    check_usable()
    if not has_gpu():
        return
    import torch

    count = torch.cuda.device_count()
    if local_rank >= count and not _given_its_own(count):
        raise ConfigError(
            f"local rank {local_rank} has no GPU: this machine has {count}; "
            f"start at most that many processes on it (--nproc_per_node), or set MEGATRON_FT_DEVICE=cpu"
        )
    torch.cuda.set_device(0 if _given_its_own(count) else local_rank)


def _given_its_own(count: int) -> bool:
    """Return whether srun has given this process its own GPUs. A launcher that shows all GPUs to all processes sets LOCAL_WORLD_SIZE."""
    if "LOCAL_WORLD_SIZE" in os.environ:
        return False
    return count == 1 or "SLURM_GPUS_PER_TASK" in os.environ


def claim(store: Store) -> None:
    """Raise ConfigError where another process of this run has the same GPU: NCCL would end, or hang, at the first exchange.

    store: torch.distributed's, that all processes share.
    """
    if not has_gpu():
        return
    import torch

    uuid = getattr(torch.cuda.get_device_properties(torch.cuda.current_device()), "uuid", None)
    if uuid is not None and store.add(f"GPU {socket.gethostname()} {uuid}", 1) > 1:
        raise ConfigError(
            f"two processes of this run were given the same GPU of {socket.gethostname()}: give each its own (srun --gpus-per-task=1), "
            f"or start one process per machine with --nproc_per_node"
        )


def memories() -> list[int]:
    """Return the bytes of memory of each GPU that this process may use; [] on a CPU."""
    if not has_gpu():
        return []
    import torch

    return [torch.cuda.get_device_properties(number).total_memory for number in range(torch.cuda.device_count())]


def adopt(where: torch.device) -> None:
    """Make the calling thread use this device. A new thread would use the first GPU of the machine."""
    if has_gpu():
        import torch

        torch.cuda.set_device(where)


def pinned(tensor: torch.Tensor) -> torch.Tensor:
    """Return the tensor in memory from which a GPU copies without the host waiting; on a CPU as it is."""
    return tensor.pin_memory() if has_gpu() else tensor


def handed(values: list | torch.Tensor) -> torch.Tensor:
    """Return numbers of the host as a tensor on the device; the host does not wait. values: a list, or a tensor."""
    import torch

    return pinned(torch.as_tensor(values)).to(current_device(), non_blocking=True)


def synchronize() -> None:
    """Wait for the device's queued work, so that a host clock reads true."""
    if has_gpu():
        import torch

        torch.cuda.synchronize()


def empty_cache() -> None:
    """Give freed memory of the GPU back, and count its peak anew. Nothing to do on a CPU."""
    if has_gpu():
        import torch

        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats()


def peak_memory_bytes() -> int:
    """Return the most memory used so far: allocated on the GPU, or the process's resident set on a CPU (bytes)."""
    if has_gpu():
        import torch

        return torch.cuda.max_memory_allocated()
    import resource

    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


def rng_state() -> dict:
    """Return the device's random state as plain tensors, for checkpoints."""
    import torch

    state = {"cpu": torch.get_rng_state()}
    if has_gpu():
        state["device"] = torch.cuda.get_rng_state()
    return state


def set_rng_state(state: dict) -> None:
    """Put back what `rng_state` returned. A checkpoint made on the other kind of device keeps that part untouched."""
    import torch

    torch.set_rng_state(state["cpu"])
    if has_gpu() and "device" in state:
        torch.cuda.set_rng_state(state["device"])
