"""Process groups and seeds, made once and passed on as one `Layout`.

It handles tensor, pipeline and data parallelism as sizes and ranks. Models and data are in other modules.
"""

from __future__ import annotations

import contextlib
import datetime
import os
import random
import socket
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, Self

from megatron_ft import device
from megatron_ft.config import rank_errors
from megatron_ft.config.sections import Parallelism
from megatron_ft.engine.start import prepare_engine
from megatron_ft.errors import ConfigError
from megatron_ft.wording import counted


@dataclass(frozen=True)
class Layout:
    """The position of this rank. Sizes multiply to the world size; megatron-core's rank order is tp, then dp, then pp."""

    tp_size: int
    pp_size: int
    dp_size: int
    tp_rank: int
    pp_rank: int
    dp_rank: int
    sequence_parallel: bool
    rank: int
    vp_size: int = 1
    """Chunks of layers a stage holds (interleaved pipeline)."""
    cp_size: int = 1
    """Processes that share the positions of each row."""
    cp_rank: int = 0
    ep_size: int = 1
    """Processes that share the experts of a layer; for all other parameters each is a data-parallel rank."""
    ep_rank: int = 0

    @property
    def world_size(self) -> int:
        return self.tp_size * self.pp_size * self.dp_size * self.cp_size

    @property
    def sizes(self) -> list[int]:
        """Return TP, PP, DP, and CP if it is above 1. They must be the same for random streams to continue."""
        return [self.tp_size, self.pp_size, self.dp_size, *([self.cp_size] if self.cp_size > 1 else [])]

    @property
    def is_first_stage(self) -> bool:
        return self.pp_rank == 0

    @property
    def is_last_stage(self) -> bool:
        return self.pp_rank == self.pp_size - 1

    @property
    def is_main(self) -> bool:
        """Return whether this is the rank that writes shared files."""
        return self.rank == 0

    @property
    def is_reporter(self) -> bool:
        """Return whether this is the rank that has the loss and prints: the first TP and DP rank of the last stage."""
        return self.is_last_stage and self.tp_rank == self.dp_rank == self.cp_rank == 0

    def __str__(self) -> str:
        sizes = {
            "TP": self.tp_size, "PP": self.pp_size, "VPP": self.vp_size, "CP": self.cp_size, "EP": self.ep_size, "DP": self.dp_size,
        }  # fmt: skip
        parts = [f"{name}{size}" for name, size in sizes.items() if size > 1 or name in ("TP", "PP", "DP")]
        return " x ".join(parts) + (" + sequence parallel" if self.sequence_parallel else "")


def world_size() -> int:
    """Return the number of processes that the launcher started (1 without a launcher)."""
    return int(os.environ.get("WORLD_SIZE", "1"))


def rank() -> int:
    """Return the global rank of this process, also before any process group exists."""
    return int(os.environ.get("RANK", "0"))


def local_rank() -> int:
    """Return the number of this process on its machine."""
    return int(os.environ.get("LOCAL_RANK", "0"))


@contextlib.contextmanager
def joined() -> Iterator[None]:
    """Provide one process group for several runs of the same ranks. Without it, process_groups would create and destroy one each time, but
    the port of a launcher can be used only once.
    """
    prepare_engine()
    import torch.distributed as dist

    device.select(local_rank())
    _init_process_group(dist, None)
    try:
        yield
    finally:
        dist.destroy_process_group()


@dataclass(frozen=True)
class ParallelSizes:
    """Sizes of the groups that share one replica of the model. The rest of the processes are data parallel.

    A new kind of parallelism is one more field, here and in Layout.
    """

    tensor: int = 1
    pipeline: int = 1
    context: int = 1
    expert: int = 1
    """Ranks that share the experts of a layer. For all other parameters they are data-parallel, so they need no additional processes."""
    chunks: int = 1
    """Chunks of layers a pipeline stage holds; above 1 the pipeline is interleaved. They take no processes."""
    sequence_parallel: bool = False
    """Split activations over the tensor-parallel group outside the matrix products."""

    @classmethod
    def of(cls, parallel: Parallelism, chunks: int) -> Self:
        """Take the sizes from settings. chunks: of the split that these settings make of the model's layers."""
        tensor, pipeline, context = parallel.model_parallel_sizes
        return cls(tensor, pipeline, context, chunks=chunks, sequence_parallel=parallel.sequence_parallel)

    @property
    def processes(self) -> int:
        """Return the number of processes that hold one replica."""
        return self.tensor * self.pipeline * self.context


@contextlib.contextmanager
def process_groups(
    sizes: ParallelSizes | None = None, seed: int = 1234, timeout_minutes: float = 30.0
) -> Iterator[Layout]:
    """Make torch.distributed's and megatron-core's process groups, seed, yield the Layout, take them down again.

    sizes: None is one process. timeout_minutes: how long a process waits for another.
    Raise ConfigError when the number of processes is not a multiple of those of a replica.
    """
    sizes = sizes or ParallelSizes()
    tp, pp, replica = sizes.tensor, sizes.pipeline, sizes.processes
    if world_size() % replica:
        context = f" x context_parallel_size {sizes.context}" if sizes.context > 1 else ""
        raise ConfigError(
            f"{counted(world_size(), 'process')} started, but tensor_model_parallel_size {tp} x pipeline_model_parallel_size {pp}{context} "
            f"needs a multiple of {replica}: start them with --nproc_per_node {replica}, or lower the sizes"
        )
    prepare_engine()
    import torch.distributed as dist
    from megatron.core import parallel_state

    if tp > 1:
        device.order_streams()
    device.select(local_rank())
    timeout = datetime.timedelta(minutes=timeout_minutes)
    started_here = not dist.is_initialized()
    if started_here:
        _init_process_group(dist, timeout)
    older = _groups(dist)
    parallel_state.initialize_model_parallel(
        tp, pp, sizes.chunks if sizes.chunks > 1 else None, context_parallel_size=sizes.context,
        expert_model_parallel_size=sizes.expert, distributed_timeout_minutes=timeout_minutes, create_gloo_process_groups=True,
    )  # fmt: skip
    layout = _layout(parallel_state, sizes)
    seed_everything(seed, layout)
    try:
        yield layout
    except Exception as error:
        rank_errors.about_to_fail(error)
        raise
    finally:
        # The engine drops its groups without destroying them, and each group holds threads and connections.
        for group in _groups(dist):
            if group not in older:
                dist.destroy_process_group(group)
        parallel_state.destroy_model_parallel()
        if started_here:
            dist.destroy_process_group()


def _init_process_group(dist: Any, timeout: datetime.timedelta | None) -> None:
    """Initialise torch.distributed. timeout: None is torch's default."""
    if "MASTER_ADDR" in os.environ:
        try:
            dist.init_process_group(device.backend(), timeout=timeout, **_held_store(dist, timeout))
        except dist.DistNetworkError as error:
            if "EADDRINUSE" not in str(error):
                raise
            raise ConfigError(
                f"port {os.environ['MASTER_PORT']} of {socket.gethostname()}, at which the processes of this run connect, is used by "
                f"another program: choose a free one with --master_port or MASTER_PORT"
            ) from error
        device.claim(dist.distributed_c10d._get_default_store())
    else:  # one process without a launcher: no port to agree on
        dist.init_process_group(device.backend(), store=dist.HashStore(), rank=0, world_size=1, timeout=timeout)


def _held_store(dist: Any, timeout: datetime.timedelta | None) -> dict:
    """Return arguments for rank 0 if the launcher has bound the port where the ranks connect: a store of torch on that socket."""
    held = os.environ.pop(rank_errors.MEETING, None)
    if held is None:
        return {}
    store = dist.TCPStore(
        os.environ["MASTER_ADDR"], int(os.environ["MASTER_PORT"]), world_size(), True,
        timeout or dist.default_pg_timeout, master_listen_fd=int(held),
    )  # fmt: skip
    # The other ranks use the environment variables, with which torch prefixes all keys by this.
    return {"store": dist.PrefixStore("default_pg", store), "rank": rank(), "world_size": world_size()}


def _groups(dist: Any) -> list:
    """Return every process group of this process, the default one included, in the order in which they were made.

    That order is the same on all ranks, and ending a group may wait for its other members.
    """
    return list(dist.distributed_c10d._world.pg_map)


def _layout(parallel_state: Any, sizes: ParallelSizes) -> Layout:
    return Layout(
        tp_size=parallel_state.get_tensor_model_parallel_world_size(),
        pp_size=parallel_state.get_pipeline_model_parallel_world_size(),
        dp_size=parallel_state.get_data_parallel_world_size(),
        tp_rank=parallel_state.get_tensor_model_parallel_rank(),
        pp_rank=parallel_state.get_pipeline_model_parallel_rank(),
        dp_rank=parallel_state.get_data_parallel_rank(),
        sequence_parallel=sizes.sequence_parallel and sizes.tensor > 1,
        rank=rank(),
        vp_size=sizes.chunks,
        cp_size=parallel_state.get_context_parallel_world_size(),
        cp_rank=parallel_state.get_context_parallel_rank(),
        ep_size=parallel_state.get_expert_model_parallel_world_size(),
        ep_rank=parallel_state.get_expert_model_parallel_rank(),
    )


def seed_everything(seed: int, layout: Layout) -> None:
    """Seed Python, numpy, torch and the engine's tensor-parallel streams.

    As Megatron: pipeline stages get streams 100 apart; data-parallel ranks get their own (10 apart), since they see other samples.
    """
    import numpy as np
    import torch
    from megatron.core import tensor_parallel

    own = seed + 100 * layout.pp_rank + 10 * layout.dp_rank
    random.seed(own)
    np.random.seed(own)
    torch.manual_seed(own)
    tensor_parallel.model_parallel_cuda_manual_seed(own)
