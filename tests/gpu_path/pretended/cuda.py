"""Answers of torch.cuda for a machine with GPUs: devices, streams, events, memory, random state."""

from __future__ import annotations

import collections
import contextlib
import sys
import types
from typing import Any

import torch
import torch.cuda.nccl

from tests.gpu_path.pretended.dispatch import GENERATOR
from tests.gpu_path.pretended.patches import replace
from tests.gpu_path.pretended.report import note_wait
from tests.gpu_path.pretended.tensor import Bound, Gpu, Refused, gpu, touch

NAME = "NVIDIA H100 80GB HBM3"
MEMORY = 80 * 2**30
"""Bytes."""


class Event:
    """Marks a place in a stream; all is done as soon as it is asked for."""

    def __init__(self, *_: Any, **__: Any):
        pass

    def record(self, stream: Any = None) -> None:
        touch("event.record")

    def wait(self, stream: Any = None) -> None:
        pass

    def query(self) -> bool:
        return True

    def synchronize(self) -> None:
        note_wait("event.synchronize")

    def elapsed_time(self, other: Event) -> float:
        return 1.0


class Stream:
    """A queue in which everything has run already: that two streams race cannot be seen."""

    cuda_stream = 0

    def __init__(self, *_: Any, **__: Any):
        self.device = gpu()

    def wait_stream(self, other: Stream) -> None:
        pass

    def wait_event(self, event: Event) -> None:
        pass

    def record_event(self, event: Event | None = None) -> Event:
        return event or Event()

    def query(self) -> bool:
        return True

    def synchronize(self) -> None:
        note_wait("stream.synchronize")

    def __enter__(self) -> Stream:
        return self

    def __exit__(self, *_: Any) -> None:
        pass


class _DeviceContext(contextlib.nullcontext):
    """torch.cuda.device(n)."""

    def __init__(self, *_: Any):
        super().__init__()


def install(count: int) -> None:
    """Replace functions of torch.cuda; `count` devices."""
    for name, answer in (_about_devices(count) | _about_memory() | _about_numbers() | _about_streams()).items():
        replace(torch.cuda, name, answer)
    for name in ("get_rng_state", "set_rng_state", "manual_seed", "manual_seed_all"):
        replace(torch.cuda.random, name, _about_numbers()[name])
    replace(torch.cuda, "get_rng_state_all", lambda: [GENERATOR.get_state()])
    replace(torch.cuda.nccl, "version", lambda: (2, 28, 9))
    replace(torch.version, "cuda", torch.version.cuda or "13.0")
    replace(torch, "Generator", _AnyGenerator)
    replace(torch._C, "_cuda_getDevice", lambda: Bound.index)


def _about_devices(count: int) -> dict[str, Any]:
    properties = types.SimpleNamespace(
        name=NAME, major=9, minor=0, total_memory=MEMORY, multi_processor_count=132, warp_size=32, L2_cache_size=50 * 2**20
    )  # fmt: skip

    def set_device(device: Any) -> None:
        index = device if isinstance(device, int) else torch.device(device).index or 0
        if index >= count:
            raise Refused(f"CUDA error: invalid device ordinal {index} of {count}")
        Bound.index = index

    return {
        "is_available": lambda: True,
        "is_initialized": lambda: True,
        "init": _nothing,
        "_lazy_init": _nothing,
        "_lazy_call": lambda call, **_: call(),
        "device_count": lambda: count,
        "current_device": _current_device,
        "set_device": set_device,
        "device": _DeviceContext,
        "get_device_name": lambda *_: NAME,
        "get_device_properties": lambda *_: properties,
        "get_device_capability": lambda *_: (9, 0),
        "is_bf16_supported": lambda *_, **__: True,
    }


def _current_device() -> Any:
    """A number. The engine hands it to factories, whose C++ would ask the driver about a number: it gets the device instead."""
    caller = sys._getframe(1).f_globals.get("__name__", "")
    return gpu() if caller.startswith("megatron.core") else Bound.index


def _about_memory() -> dict[str, Any]:
    used = MEMORY // 80
    amounts = ("memory_allocated", "max_memory_allocated", "memory_reserved", "max_memory_reserved")
    return {name: lambda *_: used for name in amounts} | {
        "mem_get_info": lambda *_: (MEMORY - used, MEMORY),
        "memory_stats": lambda *_: collections.defaultdict(int),
        "empty_cache": _nothing,
        "ipc_collect": _nothing,
        "reset_peak_memory_stats": _nothing,
    }


def _about_numbers() -> dict[str, Any]:
    def set_rng_state(state: torch.Tensor, *_: Any, **__: Any) -> None:
        if isinstance(state, Gpu):
            raise Refused("RNG state must be a torch.ByteTensor")
        GENERATOR.set_state(state)

    return {
        "get_rng_state": lambda *_, **__: GENERATOR.get_state(),
        "set_rng_state": set_rng_state,
        "manual_seed": GENERATOR.manual_seed,
        "manual_seed_all": GENERATOR.manual_seed,
        "initial_seed": GENERATOR.initial_seed,
        "default_generators": collections.defaultdict(lambda: GENERATOR),
    }


def _about_streams() -> dict[str, Any]:
    def synchronize(*_: Any) -> None:
        touch("torch.cuda.synchronize")
        note_wait("torch.cuda.synchronize")

    return {
        "synchronize": synchronize,
        "Stream": Stream,
        "Event": Event,
        "current_stream": lambda *_: Stream(),
        "default_stream": lambda *_: Stream(),
        "stream": lambda *_: contextlib.nullcontext(),
        "set_stream": _nothing,
        "is_current_stream_capturing": lambda: False,
        "nvtx": types.SimpleNamespace(
            range_push=_nothing, range_pop=_nothing, range=lambda *_: contextlib.nullcontext()
        ),
    }


class _AnyGenerator(torch.Generator):
    """torch.Generator("cuda") as well."""

    def __new__(cls, device: Any = "cpu"):
        return torch._C.Generator.__new__(torch._C.Generator, "cpu")


def _nothing(*_: Any, **__: Any) -> None:
    pass
