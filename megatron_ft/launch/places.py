"""The rank of each process of a run, from flags, from SLURM's environment, or on a single machine.

torch.distributed reads RANK, WORLD_SIZE, LOCAL_RANK, MASTER_ADDR and MASTER_PORT, as torchrun sets them.
"""

from __future__ import annotations

import os
from dataclasses import dataclass

from megatron_ft.config.sections import Processes
from megatron_ft.errors import ConfigError
from megatron_ft.log import setup

_STEP_NODES, _STEP_TASKS = "SLURM_STEP_NUM_NODES", "SLURM_STEP_NUM_TASKS"
"""Variables that only srun sets; most others are also in the environment of a batch script."""


@dataclass(frozen=True)
class Places:
    """The processes of one machine within the run."""

    here: int
    """Number of processes on this machine."""
    nodes: int
    node: int
    """Number of this machine, from 0."""
    address: str
    """Machine of rank 0."""
    port: int
    """0 on a single machine: the launcher finds a free one, see meeting.py."""

    @property
    def world_size(self) -> int:
        return self.here * self.nodes

    def rank(self, local: int) -> int:
        return self.node * self.here + local

    def environment(self, local: int) -> dict[str, str]:
        """Return the environment variables of process `local` of this machine."""
        return {
            "RANK": str(self.rank(local)), "LOCAL_RANK": str(local), "WORLD_SIZE": str(self.world_size),
            "LOCAL_WORLD_SIZE": str(self.here), "GROUP_RANK": str(self.node),
            "MASTER_ADDR": self.address, "MASTER_PORT": str(self.port),
        }  # fmt: skip


def is_rank() -> bool:
    """Return True if a launcher (this project's, torchrun or another) has started this process as one of several."""
    return "RANK" in os.environ and "WORLD_SIZE" in os.environ


def join_srun(launching: Processes) -> None:
    """Set torch's environment variables if srun started this process as one of several, which start no others.

    Raise ConfigError if they are on several machines and MASTER_ADDR is not set.
    """
    slurm = os.environ
    if (
        is_rank()
        or launching.nproc_per_node is not None
        or int(slurm.get(_STEP_TASKS, "1")) < 2
        or "SLURM_PROCID" not in slurm
    ):
        return
    if "MASTER_ADDR" not in slurm and int(slurm.get(_STEP_NODES, "1")) > 1:
        raise ConfigError(
            f"srun started {slurm[_STEP_TASKS]} processes on {slurm[_STEP_NODES]} machines, and MASTER_ADDR is not set: export MASTER_ADDR "
            f"(the first machine's name) and MASTER_PORT (a free port on it), or start one task per machine with --nproc_per_node"
        )
    os.environ.setdefault("MASTER_ADDR", "localhost")
    os.environ.setdefault("MASTER_PORT", str(20000 + int(slurm.get("SLURM_JOB_ID", "0")) % 20000))
    os.environ.update(
        RANK=slurm["SLURM_PROCID"], WORLD_SIZE=slurm[_STEP_TASKS], LOCAL_RANK=slurm.get("SLURM_LOCALID", "0")
    )
    setup()  # from now on only one rank logs what all ranks do


def places(launching: Processes) -> Places:
    """Return the places from flags, else from srun's variables. Raise ConfigError if several machines lack an address."""
    slurm = os.environ if _STEP_NODES in os.environ else {}  # a batch script outside srun has SLURM_NODEID too
    nodes = launching.nnodes or int(slurm.get(_STEP_NODES, "1"))
    if nodes > 1 and launching.node_rank is None and not slurm:
        raise ConfigError(
            f"--nnodes {nodes} needs --node_rank, a different one on every machine: 0 to {nodes - 1} (with srun it is set automatically)"
        )
    node = launching.node_rank if launching.node_rank is not None else int(slurm.get("SLURM_NODEID", "0"))
    address = launching.master_addr or os.environ.get("MASTER_ADDR")
    port = launching.master_port or int(os.environ.get("MASTER_PORT", "0"))
    if not 0 <= node < nodes:
        raise ConfigError(f"--node_rank {node} with --nnodes {nodes}: machines are numbered from 0 to {nodes - 1}")
    if nodes > 1 and not (address and port):
        raise ConfigError(
            f"--nnodes {nodes} needs --master_addr and --master_port, the same on every machine: the first machine's name and a free "
            f"port on it (or MASTER_ADDR and MASTER_PORT in the environment)"
        )
    return Places(launching.nproc_per_node or 1, nodes, node, address or "localhost", port)
