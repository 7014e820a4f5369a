"""Ways between host and GPU that Python takes before the dispatcher sees anything: Tensor.to and cuda, torch.tensor, Module.to.

C++ would ask the driver for the number of a device; here each is turned into the one operation aten._to_copy.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from typing import Any

import torch

from tests.gpu_path.pretended.patches import replace
from tests.gpu_path.pretended.report import note_wait
from tests.gpu_path.pretended.tensor import HOST, Gpu, Refused, gpu, names_gpu

TO_HOST: list[bool] = []
"""Not empty while Python asks for a copy on the host. C++ that names the CPU otherwise means where it believes the tensor to be."""


def install() -> None:
    """Replace torch's functions."""
    replace(torch.Tensor, "to", to)
    replace(torch.Tensor, "cuda", lambda self, device=None, *_, **options: self.to(gpu(), **options))
    replace(torch.Tensor, "is_pinned", lambda self, *_: getattr(self, "_pinned", False))
    replace(torch.Tensor, "pin_memory", _pin_memory)
    for name in ("tensor", "as_tensor"):
        replace(torch, name, _from_numbers(getattr(torch, name)))
    replace(torch.utils, "swap_tensors", _swap_keeping_attributes(torch.utils.swap_tensors))


_TO = torch.Tensor.to


def to(self: torch.Tensor, *args: Any, **options: Any) -> torch.Tensor:
    """Tensor.to, for tensors of both kinds."""
    if args and isinstance(args[0], torch.Tensor):
        args = (args[0].device, args[0].dtype, *args[1:])
    if args and isinstance(args[0], int) and not isinstance(args[0], bool):
        args = (torch.device("cuda", args[0]), *args[1:])
    given = {name: value for name, value in options.items() if name != "copy"}
    device, dtype, without_waiting, layout = torch._C._nn._parse_to(*args, **given)
    if device is None:
        return _TO(self, *args, **options)
    onto, source = names_gpu(device), isinstance(self, Gpu)
    if not onto and not source:
        return _TO(self, *args, **options)
    if onto and source and dtype in (None, self.dtype) and not options.get("copy") and layout is None:
        return self
    wanted = {
        "dtype": dtype,
        "device": gpu() if onto else HOST,
        "non_blocking": without_waiting,
        "memory_format": layout,
    }
    with contextlib.nullcontext() if onto else _to_host():
        return torch.ops.aten._to_copy(self, **wanted)


@contextlib.contextmanager
def _to_host() -> Iterator[None]:
    TO_HOST.append(True)
    try:
        yield
    finally:
        TO_HOST.pop()


def _pin_memory(self: torch.Tensor, *_: Any) -> torch.Tensor:
    if isinstance(self, Gpu):
        raise Refused("cannot pin 'torch.cuda.FloatTensor' only dense CPU tensors can be pinned")
    copy = self.clone()
    copy._pinned = True
    return copy


def _from_numbers(make: Callable) -> Callable:
    """torch.tensor and torch.as_tensor make it on the host and copy it, for which the host waits."""

    def made(data: Any, *args: Any, device: Any = None, **options: Any) -> torch.Tensor:
        data = _read(data) if isinstance(data, list | tuple) else data
        if isinstance(data, Gpu):
            return data.to(device or gpu(), options.get("dtype") or data.dtype)
        if not names_gpu(device):
            return make(data, *args, **options, **({} if device is None else {"device": device}))
        wanted = options.pop("requires_grad", False)
        return make(data, *args, **options).to(gpu()).requires_grad_(wanted)

    return made


def _read(data: Any) -> Any:
    """Tensors within lists: each is read by the host."""
    if isinstance(data, Gpu):
        note_wait("item, within torch.tensor([...])")
        return data.host.tolist()
    return [_read(part) for part in data] if isinstance(data, list | tuple) else data


def _swap_keeping_attributes(swap: Callable) -> Callable:
    """Module.to: a real GPU tensor takes the place of .data, and the parameter keeps what is written on it."""

    def swapped(first: torch.Tensor, second: torch.Tensor) -> None:
        kept = {name: value for name, value in vars(first).items() if name != "host"}
        swap(first, second)
        vars(first).update(kept)

    return swapped
