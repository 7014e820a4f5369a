"""Saves and loads the distributed optimizer's state in torch_dist checkpoints. Each parameter passes through the memory of one rank: its
owner.

The engine (megatron-core 0.16.1 and 0.19.2, `fully_reshardable`) collects the whole state on every data-parallel rank at a save, and
reads all of it on every rank at a load. Here the parameters are divided over the ranks of a data-parallel group by size. At a save the
owner collects one parameter at a time from the ranks that hold its parts; at a load it reads its own parameters and sends the parts to
their ranks. The host memory of a rank grows by its share and one parameter. Keys, shapes and files are the engine's, and each can read
what the other has written.

To be replaced when the engine's `fully_reshardable` collects by owner. Both versions have only
`distrib_optim_fully_reshardable_mem_efficient` (data-parallel rank 0 holds everything), and `fully_sharded_model_space` (no exchange at
all), which is deprecated.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any, NamedTuple

import torch
import torch.distributed as dist
from megatron.core.dist_checkpointing import ShardedTensor
from megatron.core.dist_checkpointing.dict_utils import dict_list_map_inplace, nested_values
from megatron.core.dist_checkpointing.mapping import ShardedTensorFactory, apply_factories
from megatron.core.dist_checkpointing.utils import extract_sharded_tensors_and_factories
from megatron.core.optimizer.distrib_optimizer import DistributedOptimizer

from megatron_ft import device
from megatron_ft.checkpoints.load import sharding_metadata
from megatron_ft.shares import deal

KEYS = ("param", "exp_avg", "exp_avg_sq")
"""What is kept of a parameter, fp32, as the engine's checkpoints call it."""
STATE_BYTES = 4 * len(KEYS)
MAIN = "fp32_from_fp16_params"
"""Where the engine's state of a bf16 or fp16 optimizer that is not distributed holds the main weights: a list for each group."""


class Piece(NamedTuple):
    """A part of a flattened parameter: the numbers [start, end), and the data-parallel rank that holds their state."""

    rank: int
    start: int
    end: int


def pieces(start: int, end: int, first: int, shard: int) -> list[Piece]:
    """Return the ranks that hold the parts of a parameter at [start, end) of a buffer.

    first: where its bucket begins in the buffer. shard: numbers of the bucket that each rank holds, in the order of ranks.
    """
    holders = range((start - first) // shard, (end - 1 - first) // shard + 1)
    begins = [max(start, first + rank * shard) - start for rank in holders]
    return [Piece(*piece) for piece in zip(holders, begins, [*begins[1:], end - start], strict=True)]


def exchange(
    parts: list[Piece],
    owner: int,
    whole: torch.Tensor | None,
    mine: torch.Tensor | None,
    group: dist.ProcessGroup,
    to_owner: bool,
) -> None:
    """Move a parameter between its owner, which has all of it, and the ranks that hold its parts, in either direction.

    whole: flat, on the owner, else None. mine: this rank's piece, or None. Only these ranks communicate, point to
    point; for other ranks the call does nothing. There is no deadlock if all ranks take the parameters in the same order.
    """
    me, operations = group.rank(), []
    give, take = (dist.irecv, dist.isend) if to_owner else (dist.isend, dist.irecv)
    if me == owner:
        assert whole is not None
        for piece in parts:
            part = whole[piece.start : piece.end]
            if piece.rank != me:
                operations.append(dist.P2POp(give, part, group=group, group_peer=piece.rank))
            else:
                assert mine is not None
                target, source = (part, mine) if to_owner else (mine, part)
                target.copy_(source)
    elif mine is not None:
        operations.append(dist.P2POp(take, mine, group=group, group_peer=owner))
    for work in dist.batch_isend_irecv(operations) if operations else ():
        work.wait()


class _Parameter(NamedTuple):
    """A parameter of this rank's model. All ranks of its data-parallel group have the same ones, in the same order."""

    weight: torch.nn.Parameter
    described: ShardedTensor | ShardedTensorFactory
    """By the engine: the weight within the whole model."""
    pieces: list[Piece]

    @property
    def is_written(self) -> bool:
        """Return whether a rank of this data-parallel group writes it: not where another tensor-parallel rank or stage has the same."""
        return not any(self.described.replica_id[:-1])


def optimizer_state(optimizer: Any, weights: dict) -> ByOwner | Whole:
    """Return what takes the optimizer's state to and from torch_dist checkpoints. weights: as sharded_weights describes them.

    By owner where the optimizer is distributed, also over one rank: the engine's own way puts copies of it together there too. Else the
    engine's way. All ranks call each method together.
    """
    parts = optimizer.chained_optimizers  # one, unless a model has experts
    if len(parts) == 1 and isinstance(parts[0], DistributedOptimizer):
        return ByOwner(parts[0], weights)
    return Whole(optimizer, weights)


class Whole:
    """The engine's method: each rank has the state of all its parameters."""

    has_one_writer_each = False
    """True if exactly one rank writes each tensor, without a check over all ranks."""

    def __init__(self, optimizer: Any, weights: dict):
        self.optimizer, self.weights = optimizer, weights

    def to_save(self) -> dict[str, Any]:
        """Return the state as sharded tensors."""
        return self._described(is_loading=False)

    def to_load(self) -> dict[str, Any]:
        """Return the state to request from the checkpoint."""
        return self._described(is_loading=True)

    def put_back(self, state: dict[str, Any]) -> None:
        """Load the state that was read."""
        if MAIN in state:
            state[MAIN] = [state[MAIN].get(number, []) for number in range(len(self.optimizer.param_groups))]
        self.optimizer.load_state_dict(state)

    def _described(self, is_loading: bool) -> dict[str, Any]:
        """Return the engine's sharded state, with the main weights by the number of their group.

        An empty group, of a rank that trains none of its parameters, would be saved as an object that all ranks share. They do not share
        it, so the others could not load it.
        """
        state = self.optimizer.sharded_state_dict(self.weights, is_loading=is_loading, metadata=sharding_metadata())
        if MAIN in state:
            state[MAIN] = {number: group for number, group in enumerate(state[MAIN]) if group}
        return state


class ByOwner:
    """The state of a distributed optimizer's parameters, each through its owner. Methods as of `Whole`."""

    has_one_writer_each = True

    def __init__(self, optimizer: DistributedOptimizer, weights: dict):
        self.optimizer, self.group = optimizer, optimizer.data_parallel_group
        self.parameters = _parameters(optimizer, weights)

    def to_save(self) -> dict[str, Any]:
        """Return this rank's own parameters' state as sharded tensors in host memory; make the owners write the weights too."""
        sizes = [
            p.weight.numel() * (STATE_BYTES + p.weight.element_size()) if p.is_written else 0 for p in self.parameters
        ]
        held, own = [self._held(parameter) for parameter in self.parameters], {}
        self._connect()
        for index, owner in enumerate(deal(sizes, self.group.size())):
            parameter = self.parameters[index]
            if not parameter.is_written:
                continue
            is_mine = owner == self.group.rank()
            parameter.described.replica_id = (*parameter.described.replica_id[:-1], int(not is_mine))
            found = {key: self._collect(parameter, owner, held[index].get(key)) for key in KEYS}
            if is_mine:
                own[index] = {
                    key: _separate(parameter.described, key, flat) for key, flat in found.items() if flat is not None
                }
        state = self.optimizer.state_dict() | {"param_state_sharding_type": "fully_reshardable"}
        return state | _filled(own)

    def to_load(self) -> dict[str, Any]:
        """Return the state to request from the checkpoint."""
        self.optimizer.load_state_dict(self.optimizer.state_dict())  # creates the moments if there are none yet
        described = [parameter.described for parameter in self.parameters]
        me, owners = self.group.rank(), self._readers()
        own = {
            index: {key: _request(described[index], key) for key in KEYS}
            for index in range(len(owners))
            if owners[index] == me
        }
        return _filled(own)

    @torch.no_grad()  # in fp32 the engine's main parameters are views of the parameters themselves
    def put_back(self, state: dict[str, Any]) -> None:
        """Load the state that was read."""
        own = state.pop("param_state", {})
        self.optimizer.load_state_dict(state)
        self._connect()
        for index, owner in enumerate(self._readers()):
            parameter, read = self.parameters[index], own.pop(index, {})
            held = self._held(parameter)
            for key in KEYS:
                whole = _flat(parameter.described, read.pop(key)) if read else None
                exchange(parameter.pieces, owner, whole, held.get(key), self.group, to_owner=False)

    def _readers(self) -> list[int]:
        """Return the owner of each parameter at a load."""
        return deal([parameter.weight.numel() for parameter in self.parameters], self.group.size())

    def _held(self, parameter: _Parameter) -> dict[str, torch.Tensor]:
        """Return this rank's part of a parameter's state, as the optimizer's own tensors; {} if it has none."""
        if all(piece.rank != self.group.rank() for piece in parameter.pieces):
            return {}
        found = self.optimizer._get_main_param_and_optimizer_states(parameter.weight)
        return {key: found[key].detach() for key in KEYS}

    def _collect(self, parameter: _Parameter, owner: int, mine: torch.Tensor | None) -> torch.Tensor | None:
        """Return one of KEYS of a parameter in host memory, flat, on its owner; None on other ranks."""
        is_mine = owner == self.group.rank()
        whole = torch.empty(parameter.weight.numel(), device=device.current_device()) if is_mine else None
        exchange(parameter.pieces, owner, whole, mine, self.group, to_owner=True)
        return None if whole is None else whole.cpu()

    def _connect(self) -> None:
        """Make one call in the group with all its ranks: NCCL requires this for the first call, and after a resume there may be none."""
        dist.barrier(self.group)


def _parameters(optimizer: DistributedOptimizer, weights: dict) -> list[_Parameter]:
    """Return the parameters in the engine's order, by which its checkpoints number them."""
    tensors, _ = extract_sharded_tensors_and_factories(weights)
    described = {entry.data: entry for entry in nested_values(tensors)}
    found = []
    for buffer in optimizer.buffers:
        for weight, (start, end, bucket_id) in buffer.param_index_map.items():
            bucket = buffer.buckets[bucket_id]
            shard = bucket.grad_data.numel() // optimizer.data_parallel_group.size()
            found.append(_Parameter(weight, described[weight], pieces(start, end, bucket.offset, shard)))
    return found


def _filled(own: dict[int, dict]) -> dict[str, dict]:
    """Return the entry for the state of a parameter group. A rank that owns nothing has none: an empty one would be saved as an object."""
    return {"param_state": own} if own else {}


def _describe(described: ShardedTensor | ShardedTensorFactory, key: str, data: torch.Tensor) -> dict:
    """Return sharded tensors of one of KEYS, under "". They are cut like the weight, which a factory may store in several parts."""
    changes: dict[str, Any] = {
        "key": f"optimizer.state.{key}.{described.key}",
        "data": data.view(described.data.shape),
        "replica_id": (*described.replica_id[:-1], 0),  # no other rank of the data-parallel group has it
    }
    if isinstance(described, ShardedTensor):
        changes["dtype"] = data.dtype
    state = {"": replace(described, **changes)}
    apply_factories(state)
    return state


def _separate(described: ShardedTensor | ShardedTensorFactory, key: str, flat: torch.Tensor) -> Any:
    """Return the same with a separate storage for each part, because the engine would copy those of all parameters at once."""
    state = _describe(described, key, flat)
    for part in nested_values(state):
        if part.data.numel() < flat.numel():
            part.data = part.data.clone()
    return state[""]


def _request(described: ShardedTensor | ShardedTensorFactory, key: str) -> Any:
    """Return the same without values."""
    state = _describe(described, key, torch.empty(described.data.numel(), device="meta"))
    dict_list_map_inplace(lambda part: part.without_data(), state)
    return state[""]


def _flat(described: ShardedTensor | ShardedTensorFactory, read: Any) -> torch.Tensor:
    """Return what was read of a parameter in one piece, on this rank's device."""
    whole = described.merge_fn(read) if isinstance(described, ShardedTensorFactory) else read
    return whole.reshape(-1).to(device.current_device())
