"""The tensor: Python sees one on a GPU, C++ one on the host (its autograd wants streams of any other), and `host` has the numbers."""

from __future__ import annotations

import os
from typing import Any

import torch

from tests.gpu_path.pretended.report import note_wait

HOST = torch.device("cpu")


class Refused(RuntimeError):
    """What CUDA or NCCL refuses, or would answer with a crash."""


class Bound:
    """To which GPU this process is bound (torch.cuda.set_device), and which process touched it first."""

    index: int = 0
    process: int | None = None


def gpu() -> torch.device:
    """Return the device on which this process's tensors are."""
    return torch.device("cuda", Bound.index)


def names_gpu(device: Any) -> bool:
    """Return whether a device argument means a GPU. Raise Refused where it is not the one this process is bound to."""
    if device is None or isinstance(device, bool):
        return False
    index = device if isinstance(device, int) else torch.device(device).index
    if not isinstance(device, int) and torch.device(device).type != "cuda":
        return False
    if index not in (None, Bound.index):
        raise Refused(f"cuda:{index} is asked for by a process that is bound to cuda:{Bound.index}")
    return True


def touch(what: object) -> None:
    """Raise Refused in a process forked from the one that has used the GPU."""
    if Bound.process is None:
        Bound.process = os.getpid()
    elif Bound.process != os.getpid():
        raise Refused(f"{what}: Cannot re-initialize CUDA in forked subprocess")


class Gpu(torch.Tensor):
    """A tensor of which Python sees that it is on a GPU."""

    host: torch.Tensor
    __torch_function__ = torch._C._disabled_torch_function_impl

    @staticmethod
    def __new__(cls, host: torch.Tensor, requires_grad: bool = False) -> Gpu:
        made = torch.Tensor._make_wrapper_subclass(
            cls, host.size(), strides=host.stride(), storage_offset=host.storage_offset(), dtype=host.dtype,
            layout=host.layout, device=HOST, requires_grad=requires_grad,
        )  # fmt: skip
        made.host = host
        return made

    def __init__(self, *_: Any, **__: Any):
        pass

    @classmethod
    def __torch_dispatch__(cls, func, types, args=(), kwargs=None):
        from tests.gpu_path.pretended.dispatch import carry_out  # it imports this module

        return carry_out(func, args, kwargs or {})

    def __tensor_flatten__(self):  # its presence makes Module.to swap tensors instead of setting .data
        return ["host"], None

    @staticmethod
    def __tensor_unflatten__(parts, _context, *_):
        return Gpu(parts["host"])

    def __repr__(self) -> str:
        shown = self.host.detach() if self.host.numel() < 9 else tuple(self.shape)
        return f"Gpu({shown}, {self.dtype})"

    device = property(lambda self: gpu())
    is_cuda = property(lambda self: True)
    is_cpu = property(lambda self: False)

    @property
    def data(self) -> torch.Tensor:
        return torch._C.TensorBase.data.__get__(self)

    @data.setter
    def data(self, value: torch.Tensor) -> None:
        if not isinstance(value, Gpu):
            raise Refused("a CPU tensor is set as .data of a GPU tensor")
        torch._C.TensorBase.data.__set__(self, value)
        self.host = value.host

    def get_device(self) -> int:
        return Bound.index

    def type(self, dtype=None, *args, **options):
        if dtype is not None:
            return super().type(dtype, *args, **options)
        return super().type().replace("torch.", "torch.cuda.", 1)

    def cpu(self, *_, **__) -> torch.Tensor:
        return self.to(HOST)

    def tolist(self):
        touch("tolist")
        note_wait("tolist")
        return self.host.tolist()

    def numpy(self, *_, **__):
        raise Refused(
            "can't convert cuda:0 device type tensor to numpy. Use Tensor.cpu() to copy it to host memory first"
        )

    def data_ptr(self) -> int:
        return self.host.data_ptr()

    def untyped_storage(self):
        return self.host.untyped_storage()

    def __reduce_ex__(self, protocol):
        """Written as a tensor of the host: where it is read to is then the reader's own choice, not the file's."""
        touch("pickling a GPU tensor")
        note_wait("pickled as a GPU tensor")
        return self.host.detach().__reduce_ex__(protocol)

    def __deepcopy__(self, _memo):
        return Gpu(self.host.detach().clone(), self.requires_grad)
