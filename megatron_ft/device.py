"""The only file that says cuda or gloo: which device a rank computes on, and megatron-core's CPU backend.

megatron-core asks `torch.cuda` for its device, its random state and its synchronisation points. On a machine without a GPU those
questions are answered here for the CPU: every `megatron.core` module sees a stand-in for `torch` (`_EngineTorch`) in which
`device="cuda"` and `torch.cuda.current_device()` mean the CPU. The real `torch` module is left alone, except for four methods that
only a tensor or a module can carry (`Tensor.cuda`, `Tensor.type`, `Tensor.to("cuda")`, `Module.cuda`).

The random stream that megatron-core calls "cuda" is, on the CPU, torch's default generator: dropout draws from it, and the tensor
parallel RNG tracker forks it exactly as it forks a GPU's.

Knows nothing of models, data or training.
"""

from __future__ import annotations

import contextlib
import functools
import os
import queue
import sys
import types
import warnings

from megatron_ft.errors import ConfigError

SUPPORTED_ENGINE = "0.16."
"""megatron-core releases whose internals the CPU backend was checked against."""


def has_gpu() -> bool:
    """Whether this process computes on a GPU. MEGATRON_FT_DEVICE=cpu says no even where there is one."""
    import torch

    return os.environ.get("MEGATRON_FT_DEVICE", "") != "cpu" and torch.cuda.is_available()


def backend() -> str:
    """The torch.distributed backend that goes with the device: nccl on a GPU, gloo on a CPU."""
    return "nccl" if has_gpu() else "gloo"


def current_device():
    """The torch.device on which this rank's tensors live."""
    import torch

    return torch.device("cuda", torch.cuda.current_device()) if has_gpu() else torch.device("cpu")


def describe() -> str:
    """One line for people: what this process computes on."""
    import torch

    if has_gpu():
        return f"{torch.cuda.get_device_name()} (nccl)"
    return f"CPU, {torch.get_num_threads()} thread(s) a process (gloo)"


def gpu_name() -> str | None:
    """As the driver calls it; None on a CPU."""
    import torch

    return torch.cuda.get_device_name() if has_gpu() else None


def capability() -> tuple[int, int]:
    """The GPU's compute capability, as (major, minor). Only where there is one."""
    import torch

    return torch.cuda.get_device_capability()


GRADIENT_EXTENSION = "fused_weight_gradient_mlp_cuda"
"""The module of apex (built with --cpp_ext --cuda_ext) that megatron-core asks for to fuse gradient accumulation."""


def select(local_rank: int) -> None:
    """Bind this process to its GPU, by its rank on the machine. Nothing to do on a CPU."""
    if not has_gpu():
        return
    import torch

    if local_rank >= torch.cuda.device_count():
        raise ConfigError(
            f"local rank {local_rank} has no GPU: this machine has {torch.cuda.device_count()}; "
            f"start at most that many processes on it (--nproc_per_node), or set MEGATRON_FT_DEVICE=cpu"
        )
    torch.cuda.set_device(local_rank)


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
    """Most memory used so far: allocated on the GPU, or the process's resident set on a CPU (bytes)."""
    if has_gpu():
        import torch

        return torch.cuda.max_memory_allocated()
    import resource

    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


def rng_state() -> dict:
    """The device's random state as plain tensors, for checkpoints."""
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


@functools.cache
def prepare_engine() -> None:
    """Import megatron-core once, on the CPU through the stand-in. Call before any other import of megatron.core.

    Raises ConfigError when the installed megatron-core is of a release this file was not checked against.
    """
    # torch's C++ warns of every connection that another process's end closes, with its own stack. Read when torch is imported.
    os.environ.setdefault("TORCH_CPP_LOG_LEVEL", "ERROR")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        import megatron.core
        import megatron.core.dist_checkpointing.strategies.torch
        import megatron.core.inference.contexts.static_context
        import megatron.core.models.gpt
        import megatron.core.models.gpt.gpt_layer_specs
        import megatron.core.optimizer
        import megatron.core.pipeline_parallel.schedules

    version = megatron.core.__version__
    if not version.startswith(SUPPORTED_ENGINE):
        raise ConfigError(
            f"megatron-core {version} is installed, but megatron_ft was checked against {SUPPORTED_ENGINE}x: "
            f"pip install 'megatron-core>=0.16,<0.17'"
        )
    _keep_write_results_here()
    _recompute_norms_without_fp8()
    _read_objects_without_running_them()
    if not has_gpu():
        _answer_for_cpu()


def _keep_write_results_here() -> None:
    """Checkpoints are saved synchronously, so what was written need not be told to another process.

    megatron-core's default is a queue in a manager process. That process imports torch again, which takes seconds at the first
    save of every rank, and it outlives a rank that is killed.
    """
    from megatron.core.dist_checkpointing.strategies import filesystem_async

    filesystem_async._results_queue = queue.SimpleQueue()


def _read_objects_without_running_them() -> None:
    """The few objects that lie among a checkpoint's tensors are read as tensors are: what names anything else is refused.

    torch's own reader unpickles them freely, so that a checkpoint from elsewhere could run what it likes.
    """
    import torch
    from megatron.core.dist_checkpointing.strategies.torch import MCoreLoadPlanner

    free = MCoreLoadPlanner.load_bytes

    def load_bytes(self, read_item, value) -> None:
        start = value.tell()
        torch.load(value, weights_only=True)  # refuses what names more than tensors and plain containers
        value.seek(start)
        free(self, read_item, value)

    MCoreLoadPlanner.load_bytes = load_bytes


def _recompute_norms_without_fp8() -> None:
    """Recomputed norms ask Transformer Engine for its fp8 state even where it is not installed, and then fail."""
    from megatron.core import tensor_parallel
    from megatron.core.tensor_parallel import random as engine_random

    if hasattr(engine_random, "FP8GlobalStateManager"):
        return

    class WithoutFp8(engine_random.CheckpointWithoutOutput):
        def __init__(self, fp8=None):
            super().__init__(None)

    tensor_parallel.CheckpointWithoutOutput = WithoutFp8


def _answer_for_cpu() -> None:
    import torch

    stand_in = _engine_torch()
    for name, module in list(sys.modules.items()):
        if name.startswith("megatron.core") and getattr(module, "torch", None) is torch:
            module.torch = stand_in
    from megatron.core.tensor_parallel import random as engine_random

    engine_random._get_cuda_rng_state = lambda *args, **kwargs: torch.get_rng_state()
    engine_random._set_cuda_rng_state = lambda state, *args, **kwargs: torch.set_rng_state(state)
    _patch_tensor_methods(torch)


def _engine_torch() -> types.ModuleType:
    """A copy of the torch namespace in which the device named cuda is the CPU."""
    import torch

    stand_in = types.ModuleType("torch")
    stand_in.__dict__.update(torch.__dict__)
    stand_in.__getattr__ = lambda name: getattr(torch, name)
    for factory in (
        "tensor",
        "zeros",
        "ones",
        "empty",
        "full",
        "rand",
        "randn",
        "arange",
        "zeros_like",
        "ones_like",
        "empty_like",
    ):
        setattr(stand_in, factory, _on_cpu(getattr(torch, factory)))
    stand_in.cuda = _engine_cuda(torch)
    return stand_in


def _on_cpu(factory):
    @functools.wraps(factory)
    def call(*args, **kwargs):
        if "device" in kwargs and _names_gpu(kwargs["device"]):
            kwargs["device"] = "cpu"
        kwargs.pop("pin_memory", None)
        return factory(*args, **kwargs)

    return call


def _names_gpu(device) -> bool:
    return device is not None and (isinstance(device, int) or str(device).startswith("cuda"))


def _engine_cuda(torch) -> types.ModuleType:
    nothing = lambda *args, **kwargs: None  # noqa: E731
    stand_in = types.ModuleType("torch.cuda")
    stand_in.__dict__.update(torch.cuda.__dict__)
    stand_in.__getattr__ = lambda name: getattr(torch.cuda, name)
    stream = types.SimpleNamespace(wait_stream=nothing, wait_event=nothing, synchronize=nothing, record_event=nothing)
    answers = {
        "current_device": lambda: torch.device("cpu"),
        "device_count": lambda: 1,
        "set_device": nothing,
        "synchronize": nothing,
        "empty_cache": nothing,
        "manual_seed": torch.manual_seed,
        "get_rng_state": lambda *args, **kwargs: torch.get_rng_state(),
        "set_rng_state": lambda state, *args, **kwargs: torch.set_rng_state(state),
        "current_stream": lambda *args: stream,
        "default_stream": lambda *args: stream,
        "Stream": lambda *args, **kwargs: stream,
        "stream": lambda *args: contextlib.nullcontext(),
        "nvtx": types.SimpleNamespace(range_push=nothing, range_pop=nothing),
    }
    stand_in.__dict__.update(answers)
    return stand_in


def _patch_tensor_methods(torch) -> None:
    """Tensor.cuda and friends stay on the CPU; Tensor.type() reports the names megatron-core's optimizers compare with."""
    to, kind = torch.Tensor.to, torch.Tensor.type

    def to_cpu(self, *args, **kwargs):
        if args and (isinstance(args[0], (str, torch.device))) and _names_gpu(args[0]):
            args = ("cpu", *args[1:])
        if _names_gpu(kwargs.get("device")):
            kwargs["device"] = "cpu"
        return to(self, *args, **kwargs)

    def type_name(self, dtype=None, *args, **kwargs):
        name = kind(self) if dtype is None else None
        if name is None:
            return kind(self, dtype, *args, **kwargs)
        return (
            name.replace("torch.", "torch.cuda.", 1)
            if sys._getframe(1).f_globals.get("__name__", "").startswith("megatron.core")
            else name
        )

    torch.Tensor.cuda = lambda self, *args, **kwargs: self
    torch.nn.Module.cuda = lambda self, *args, **kwargs: self
    torch.Tensor.to = to_cpu
    torch.Tensor.type = type_name
