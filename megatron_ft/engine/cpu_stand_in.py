"""megatron-core's CPU backend.

megatron-core uses `torch.cuda` for its device, its random state and its synchronisation points. On a machine without a GPU every
`megatron.core` module gets a replacement of `torch` (`_engine_torch`) in which `device="cuda"` and `torch.cuda.current_device()` mean the
CPU. The real `torch` module is unchanged, except for four methods that only a tensor or a module can have (`Tensor.cuda`, `Tensor.type`,
`Tensor.to("cuda")`, `Module.cuda`).

The random stream that megatron-core calls "cuda" is torch's default generator on the CPU: dropout draws from it, and the tensor-parallel
RNG tracker forks it as it forks that of a GPU.
"""

from __future__ import annotations

import contextlib
import functools
import importlib.util
import sys
import types
from collections.abc import Callable
from typing import Any

from megatron_ft.engine.versions import patch

_NEEDS_TRITON = ("megatron.core.transformer.moe.ops.paged_stash",)
"""Modules of the engine that are imported with it, import triton without asking whether it is there, and are for experts on a GPU."""


def do_without_triton() -> None:
    """Replace modules that need triton if it is not installed. Call before megatron-core is imported.

    The CPU build of torch has no triton. The schedules of megatron-core 0.19 import kernels of it, those of 0.16 do not.
    """
    if importlib.util.find_spec("triton") is None:
        for name in _NEEDS_TRITON:
            sys.modules.setdefault(name, _left_out(name))


def _left_out(name: str) -> types.ModuleType:
    """Return a module that has every name, but nothing in it can be called."""

    def absent(*args: Any, **options: Any) -> None:
        raise NotImplementedError(f"{name} needs triton")

    def named(attribute: str) -> Callable[..., None]:
        if attribute.startswith("__"):  # attributes that Python reads from modules
            raise AttributeError(attribute)
        return absent

    module = types.ModuleType(name)
    module.__dict__["__getattr__"] = named
    return module


def apply() -> None:
    """Make all changes below. megatron-core has been imported."""
    answer_for_cpu()
    number_tokens_of_experts()
    gather_parts_of_any_length()


@patch(
    "0.16 to 0.19",
    "megatron.core.tensor_parallel.random:_get_cuda_rng_state",
    "megatron.core.tensor_parallel.random:_set_cuda_rng_state",
    *("torch:Tensor.to", "torch:Tensor.type", "torch:Tensor.cuda", "torch:nn.Module.cuda"),
)
def answer_for_cpu() -> None:
    """Replace the engine's queries of its GPU by those for the CPU, in every module of the engine that is loaded."""
    import torch

    stand_in = _engine_torch()
    modules: dict[str, Any] = dict(sys.modules)
    for name, module in modules.items():
        if name.startswith("megatron.core") and getattr(module, "torch", None) is torch:
            module.torch = stand_in
    from megatron.core.tensor_parallel import random as engine_random

    engine_random._get_cuda_rng_state = lambda *args, **kwargs: torch.get_rng_state()
    engine_random._set_cuda_rng_state = lambda state, *args, **kwargs: torch.set_rng_state(state)
    _patch_tensor_methods(torch)


def _engine_torch() -> types.ModuleType:
    """Return a copy of the torch namespace in which the device named cuda is the CPU."""
    import torch

    stand_in: Any = types.ModuleType("torch")
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


def _on_cpu(factory: Callable[..., Any]) -> Callable[..., Any]:
    @functools.wraps(factory)
    def call(*args: Any, **kwargs: Any) -> Any:
        if "device" in kwargs and _names_gpu(kwargs["device"]):
            kwargs["device"] = "cpu"
        kwargs.pop("pin_memory", None)
        return factory(*args, **kwargs)

    return call


def _names_gpu(device: Any) -> bool:
    return device is not None and (isinstance(device, int) or str(device).startswith("cuda"))


def _engine_cuda(torch: Any) -> types.ModuleType:
    nothing = lambda *args, **kwargs: None  # noqa: E731
    stand_in: Any = types.ModuleType("torch.cuda")
    stand_in.__dict__.update(torch.cuda.__dict__)
    stand_in.__getattr__ = lambda name: getattr(torch.cuda, name)
    event = types.SimpleNamespace(synchronize=nothing, wait=nothing)
    stream = types.SimpleNamespace(
        wait_stream=nothing, wait_event=nothing, synchronize=nothing, record_event=lambda *args: event
    )
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


def _patch_tensor_methods(torch: Any) -> None:
    """Make Tensor.cuda and similar methods stay on the CPU, and Tensor.type() return the names that megatron-core's optimizers compare
    with.
    """
    to, kind = torch.Tensor.to, torch.Tensor.type

    def to_cpu(self: Any, *args: Any, **kwargs: Any) -> Any:
        if args and (isinstance(args[0], (str, torch.device))) and _names_gpu(args[0]):
            args = ("cpu", *args[1:])
        if _names_gpu(kwargs.get("device")):
            kwargs["device"] = "cpu"
        return to(self, *args, **kwargs)

    def type_name(self: Any, dtype: Any = None, *args: Any, **kwargs: Any) -> Any:
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


@patch("0.16 to 0.19", "megatron.core.transformer.moe.token_dispatcher:maybe_move_tensor_to_cpu")
def number_tokens_of_experts() -> None:
    """Return the numbers of tokens per expert as numpy arrays on a CPU too. The engine converts them only for tensors on a GPU."""
    from megatron.core.transformer.moe import token_dispatcher

    moved = token_dispatcher.maybe_move_tensor_to_cpu

    def maybe_move_tensor_to_cpu(tensor: Any, as_numpy: bool = False, record_stream: bool = False) -> Any:
        tensor = moved(tensor, as_numpy, record_stream)
        return tensor.numpy() if as_numpy and hasattr(tensor, "numpy") else tensor

    token_dispatcher.maybe_move_tensor_to_cpu = maybe_move_tensor_to_cpu


@patch("0.16 to 0.19", "megatron.core.tensor_parallel.mappings:_gather_along_first_dim")
def gather_parts_of_any_length() -> None:
    """Pad the parts before a gather over the tensor-parallel ranks of experts: they hold different numbers of tokens, and gloo gathers
    only equal parts.
    """
    import torch
    from megatron.core.tensor_parallel import mappings

    gather = mappings._gather_along_first_dim

    def gather_any(x: Any, group: Any, sizes: list[int] | None = None, use_global_buffer: bool = False) -> Any:
        if sizes is None or group.size() == 1:
            return gather(x, group, None, use_global_buffer)
        longest = max(sizes)
        if not longest:
            return x
        padded = torch.cat([x, x.new_zeros((longest - len(x), *x.shape[1:]))])
        parts = gather(padded, group).split(longest)
        return torch.cat([part[:size] for part, size in zip(parts, sizes, strict=True)])

    mappings._gather_along_first_dim = gather_any
