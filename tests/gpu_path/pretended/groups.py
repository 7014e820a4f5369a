"""Process groups that say nccl: a group refuses tensors of the other kind of device, and messages meet in NCCL's order.

Carried by gloo between real processes, or by torch's fake backend for one process of a world of any size. What the fake carrier
"receives" is this rank's own numbers, or zeros from another stage: shapes, order and arguments are walked, the numbers mean nothing.

NCCL matches sends and receives of two processes in the order in which they were posted, whatever their tags; gloo goes by tags. So
every message gets its running number between its two processes in its group as its tag. Two stages that are each other's next and
previous, and post "to previous, to next" on both sides, then get each other's messages, as they would from NCCL.
"""

from __future__ import annotations

import os
from collections import Counter
from typing import Any

import torch
import torch.distributed as dist
from torch.distributed import distributed_c10d as c10d
from torch.utils import _pytree

from tests.gpu_path.pretended.patches import replace
from tests.gpu_path.pretended.report import COUNTS, note_wait, place
from tests.gpu_path.pretended.tensor import Gpu, Refused, gpu, touch

DECLARED: dict[str, str] = {}
"""Name of a group -> the backend that was asked for."""
DESTROYED: list[str] = []
"""Names of destroyed groups, in order: NCCL may hang where two ranks destroy the groups they share in different orders."""
_POSTED: Counter = Counter()
"""(group, sender, receiver) -> messages so far"""
_FAKE: list[bool] = []
"""Not empty: the world that is started next is carried by torch's fake backend."""


def carry_nothing(fake: bool) -> None:
    """Choose the carrier of the world that is started next."""
    _FAKE[:] = [True] if fake else []


def install() -> None:
    """Replace functions of torch.distributed."""
    _init, _new, _destroy, _backend = (
        getattr(c10d, name) for name in ("init_process_group", "new_group", "destroy_process_group", "get_backend")
    )

    def init_process_group(backend=None, *args, **options):
        if _FAKE:
            from torch.testing._internal.distributed.fake_pg import FakeStore

            options |= {
                "store": FakeStore(),
                "rank": int(os.environ["RANK"]),
                "world_size": int(os.environ["WORLD_SIZE"]),
            }
        _init("fake" if _FAKE else "gloo", *args, **options)
        DECLARED[dist.group.WORLD.group_name] = backend

    def new_group(ranks=None, timeout=None, backend=None, *args, **options):
        options.pop("pg_options", None)
        group = _new(ranks, timeout, "fake" if _FAKE else "gloo", *args, **options)
        if hasattr(group, "group_name"):
            DECLARED[group.group_name] = backend or DECLARED[dist.group.WORLD.group_name]
        return group

    def destroy_process_group(group=None):
        DESTROYED.append((group or dist.group.WORLD).group_name)
        _destroy(group)

    def get_backend(group=None):
        return DECLARED.get((group or dist.group.WORLD).group_name) or _backend(group)

    changed = (init_process_group, new_group, destroy_process_group, get_backend)
    for module in (c10d, dist):
        for function in changed:
            replace(module, function.__name__, function)
    replace(c10d, "_get_object_coll_device", lambda group=None: gpu() if get_backend(group) == "nccl" else "cpu")
    _carry_objects()


def _carry_objects() -> None:
    """With the fake carrier every rank says what this one says."""
    gather_all, gather, broadcast = c10d.all_gather_object, c10d.gather_object, c10d.broadcast_object_list

    def all_gather_object(object_list, obj, group=None):
        if not _FAKE:
            return gather_all(object_list, obj, group)
        object_list[:] = [obj] * len(object_list)

    def gather_object(obj, object_gather_list=None, *args, **options):
        if not _FAKE:
            return gather(obj, object_gather_list, *args, **options)
        if object_gather_list is not None:
            object_gather_list[:] = [obj] * len(object_gather_list)

    def broadcast_object_list(*args, **options):
        return None if _FAKE else broadcast(*args, **options)

    for module in (c10d, dist):
        for function in (all_gather_object, gather_object, broadcast_object_list):
            replace(module, function.__name__, function)


def collective(func: Any, args: tuple, kwargs: dict, tensors: list[torch.Tensor]) -> Any:
    """Carry out an operation of torch.distributed."""
    group = next(filter(None, map(_group, _pytree.tree_leaves((args, kwargs)))), None)
    name = str(func).split(".")[1].rstrip("_")
    backend = DECLARED.get(group.group_name, "nccl") if group else "nccl"
    on_gpu = [x for x in tensors if isinstance(x, Gpu)]
    if backend == "nccl" and len(on_gpu) < len(tensors) and "barrier" not in name:
        raise Refused(f"{func}: No backend type associated with device type cpu, in a group of nccl")
    if on_gpu:
        touch(func)
        if backend == "gloo":
            note_wait(f"{name} of a GPU tensor over gloo")
    COUNTS.collectives[name, place()[0]] += 1
    plain, plain_options = _pytree.tree_map_only(Gpu, lambda x: x.host, (args, kwargs))
    if backend == "nccl" and name in ("send", "recv"):
        plain = _numbered(name, group, plain)
    out = func(*plain, **plain_options)
    if _FAKE and tensors:
        _hallucinate(name, plain)
    return out


def _group(value: Any) -> dist.ProcessGroup | None:
    if isinstance(value, torch.ScriptObject) and "ProcessGroup" in str(value._type()):
        return dist.ProcessGroup.unbox(value)
    return None


def _numbered(name: str, group: dist.ProcessGroup, args: tuple) -> tuple:
    """(tensors, group, peer, tag) with the message's number as the tag."""
    tensors, boxed, peer, _ = args
    ends = (group.rank(), peer) if name == "send" else (peer, group.rank())
    _POSTED[group.group_name, *ends] += 1
    return tensors, boxed, peer, _POSTED[group.group_name, *ends]


def _hallucinate(name: str, args: tuple) -> None:
    """Fill what would have been received, so that numbers stay finite."""
    if name == "recv":
        for tensor in args[0]:
            tensor.zero_()
    elif "allgather" in name or "all_gather" in name or "reduce_scatter" in name:
        outputs, inputs = (_pytree.tree_leaves(x) for x in args[:2])
        whole = torch.cat([x.reshape(-1) for x in inputs])
        for tensor in outputs:
            flat = tensor.view(-1) if tensor.is_contiguous() else None
            if flat is not None:
                flat.copy_(whole.repeat(-(-flat.numel() // whole.numel()))[: flat.numel()])
