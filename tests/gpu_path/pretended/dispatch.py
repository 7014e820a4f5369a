"""Every operation on its way down: which devices meet in it, what the host waits for, where its result is."""

from __future__ import annotations

import contextlib
import threading
from collections.abc import Iterator
from typing import Any

import torch
from torch.utils import _pytree
from torch.utils._python_dispatch import TorchDispatchMode

from tests.gpu_path.pretended import attention, copies, groups
from tests.gpu_path.pretended.patches import replace
from tests.gpu_path.pretended.report import COUNTS, note_wait
from tests.gpu_path.pretended.tensor import HOST, Gpu, Refused, names_gpu, touch

aten = torch.ops.aten
GENERATOR = torch.Generator()
"""The GPU's own stream of random numbers."""
_TWO_DEVICES = {aten.copy_.default, aten._to_copy.default}
_INDEXED = {aten.index.Tensor, aten.index_put_.default, aten.index_put.default, aten._index_put_impl_.default}
"""Take their indices, but nothing else, from the host."""
_SIZE_FROM_NUMBERS = {
    aten.nonzero.default, aten.masked_select.default, aten.equal.default, aten.unique_dim.default, aten._unique2.default,
    aten.repeat_interleave.Tensor, aten.bincount.default,
}  # fmt: skip
"""The host has to know numbers before it can go on."""


class Mode(TorchDispatchMode):
    """Hands every operation to `carry_out`."""

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        return carry_out(func, args, kwargs or {})


def install() -> None:
    """Enter the mode for good, in this thread and in those that it starts."""
    run = threading.Thread.run

    def run_pretending(self: threading.Thread) -> None:
        with Mode():
            run(self)

    replace(threading.Thread, "run", run_pretending)
    Mode().__enter__()


def carry_out(func: Any, args: tuple, kwargs: dict) -> Any:
    """Do one operation on the hosts' numbers. Raise Refused where CUDA or NCCL would."""
    tensors = [x for x in _pytree.tree_leaves((args, kwargs)) if isinstance(x, torch.Tensor)]
    on_gpu = any(isinstance(x, Gpu) for x in tensors)
    if func.namespace == "c10d":
        return groups.collective(func, args, kwargs, tensors)
    if on_gpu and func.namespace == "torch_attn":
        return attention.variable_length(func, args, kwargs)
    if on_gpu and not copies.TO_HOST and kwargs.get("device") == HOST:  # C++ that repeats the device it sees
        kwargs = {name: value for name, value in kwargs.items() if name != "device"}
    device = kwargs.get("device")
    to_gpu = names_gpu(device) if device is not None else on_gpu
    if on_gpu or to_gpu:
        touch(func)
        COUNTS.operations[str(func)] += 1
        _refuse_mixed(func, args, tensors)
        _count_waits(func, args, kwargs, on_gpu, to_gpu)
    return _wrapped(func, args, kwargs, _computed(func, args, kwargs, to_gpu), to_gpu)


def _computed(func: Any, args: tuple, kwargs: dict, to_gpu: bool) -> Any:
    """Run the operation on the tensors of the host."""
    if to_gpu and kwargs.get("pin_memory"):
        raise Refused("Only dense CPU tensors can be pinned")
    plain_args, plain = _pytree.tree_map_only(Gpu, lambda x: x.host, (args, kwargs))
    plain = {name: value for name, value in plain.items() if name != "pin_memory"}
    if plain.get("device") is not None:
        plain["device"] = HOST
    with _random_numbers(func, plain) if to_gpu else contextlib.nullcontext():
        return func(*plain_args, **plain)


def _refuse_mixed(func: Any, args: tuple, tensors: list[torch.Tensor]) -> None:
    """A CPU tensor of no dimensions may meet anything; copies, and indices from the host, are no meeting."""
    if func in _TWO_DEVICES:
        return
    index = [*_pytree.tree_leaves(args[1])] if func in _INDEXED else []
    hosts = [x for x in tensors if not isinstance(x, Gpu) and x.dim() and not any(x is i for i in index)]
    if hosts and any(isinstance(x, Gpu) for x in tensors):
        shapes = [("cuda" if isinstance(x, Gpu) else "cpu", tuple(x.shape)) for x in tensors]
        raise Refused(f"Expected all tensors to be on the same device, in {func}: {shapes}")


def _count_waits(func: Any, args: tuple, kwargs: dict, on_gpu: bool, to_gpu: bool) -> None:
    if func is aten.copy_.default:
        onto, source = (isinstance(x, Gpu) for x in args[:2])
        if onto != source and not (kwargs.get("non_blocking") or (len(args) > 2 and args[2])):
            note_wait("copy_ to the host" if source else "blocking copy_ to the device")
    elif func is aten._to_copy.default:
        if on_gpu != to_gpu and not kwargs.get("non_blocking"):
            note_wait("copy to the host" if on_gpu else "blocking copy to the device")
    elif func is aten._local_scalar_dense.default:
        note_wait("item")
    elif func in _SIZE_FROM_NUMBERS and kwargs.get("output_size") is None:
        note_wait(str(func))
    elif func in _INDEXED:
        index = [x for x in args[1] if x is not None]
        if any(not isinstance(x, Gpu) for x in index):
            note_wait("blocking copy of an index to the device")
        fills = func is not aten.index.Tensor and args[2].numel() == 1
        if any(x.dtype in (torch.bool, torch.uint8) for x in index) and not fills:
            note_wait("index by a mask")


@contextlib.contextmanager
def _random_numbers(func: Any, kwargs: dict) -> Iterator[None]:
    """Draw from the GPU's stream, not from the host's."""
    if any(argument.name == "generator" for argument in func._schema.arguments):
        kwargs["generator"] = kwargs.get("generator") or GENERATOR
        yield
    elif "dropout" in str(func):
        with torch.random.fork_rng(devices=()):
            torch.set_rng_state(GENERATOR.get_state())
            yield
            GENERATOR.set_state(torch.get_rng_state())
    else:
        yield


def _wrapped(func: Any, args: tuple, kwargs: dict, out: Any, to_gpu: bool) -> Any:
    """New tensors wrapped; what an operation writes into is returned as it came."""
    written = {}
    for number, argument in enumerate(func._schema.arguments):
        if argument.alias_info is not None and argument.alias_info.is_write:
            value = args[number] if number < len(args) else kwargs.get(argument.name)
            written[frozenset(argument.alias_info.before_set)] = value

    def one(value: Any, alias: Any) -> Any:
        names = frozenset(alias.before_set) if alias is not None and alias.is_write else None
        if names in written:
            return written[names]
        return _pytree.tree_map_only(torch.Tensor, _on_gpu, value) if to_gpu else value

    returns = func._schema.returns
    if len(returns) == 1:
        return one(out, returns[0].alias_info)
    if type(out) is tuple:
        return tuple(one(value, r.alias_info) for value, r in zip(out, returns, strict=True))
    return out


def _on_gpu(tensor: torch.Tensor) -> Gpu:
    return tensor if isinstance(tensor, Gpu) else Gpu(tensor)
