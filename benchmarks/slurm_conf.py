"""What a cluster for tests is made of, and SLURM's configuration of it. See slurm_cluster.py."""

from __future__ import annotations

import os
import pwd
import shutil
import socket
import subprocess
from dataclasses import dataclass
from pathlib import Path

from benchmarks.ports import free_port

PROGRAMS = ("munged", "slurmctld", "slurmd", "sbatch", "srun", "scontrol", "scancel")
INSTALL = "apt-get install --no-install-recommends slurmctld slurmd slurm-client munge"
_PATH = os.environ.get("PATH", os.defpath) + ":/usr/sbin:/sbin"
_SHORTEST_DELAY = 5


@dataclass(frozen=True)
class Shape:
    """What a cluster is made of. Times are in seconds."""

    nodes: int = 2
    cpus: int = 8
    gpus: int = 0
    """Plain files that pass for devices."""
    memory: int = 16000
    """MB that each node claims to have."""
    apart: bool = False
    share: tuple[str, ...] = ()
    """Folders below /tmp that nodes that are apart see too. What is not below /tmp, they see anyhow."""
    grace: int = 20
    """Between the SIGTERM of a preemption and its end."""
    kill_wait: int = 5
    """Between SIGTERM and SIGKILL; 30 is SLURM's default."""
    requeue_delay: int = 5
    """Until a requeued job may start; 120 is SLURM's default. It is the life of a credential too."""
    node_timeout: int = 15
    """Until a silent node is down; 300 is SLURM's default."""
    time_limit: str = "UNLIMITED"
    """Of a job that does not say."""

    def __post_init__(self):
        if self.requeue_delay < _SHORTEST_DELAY:  # SLURM would take its default, 120, and not say so
            raise ValueError(
                f"requeue_delay {self.requeue_delay}: SLURM has no shorter one than {_SHORTEST_DELAY} seconds"
            )

    @property
    def names(self) -> list[str]:
        """Of the nodes."""
        return [f"node{n}" if self.apart else f"127.0.0.{n}" for n in range(1, self.nodes + 1)]

    @property
    def head(self) -> str:
        """The machine of the controller."""
        return "head" if self.apart else socket.gethostname().split(".")[0]

    def address(self, name: str) -> str:
        """Of a node or the head."""
        if not self.apart:
            return "127.0.0.1"
        return "10.77.0.1" if name == "head" else f"10.77.0.{10 + self.names.index(name)}"


def configure(shape: Shape, folder: Path) -> Path:
    """Write slurm.conf, and what it names, into the folder; returns its path."""
    me = pwd.getpwuid(os.geteuid()).pw_name
    port = 6817 if shape.apart else free_port()
    gres = ""
    if shape.gpus:  # a count without files is refused: the node's state would be INVAL
        for n in range(shape.gpus):
            (folder / "dev" / f"gpu{n}").touch()
        (folder / "gres.conf").write_text(f"Name=gpu File={folder}/dev/gpu[0-{shape.gpus - 1}]\n")
        gres = f"Gres=gpu:{shape.gpus}"
    lines = [
        "ClusterName=test",
        f"SlurmctldHost={shape.head}({shape.address(shape.head)})",
        f"SlurmctldPort={port}",
        "AuthType=auth/munge",
        f"AuthInfo=socket={folder}/munge.socket,cred_expire={shape.requeue_delay}",
        "CommunicationParameters=NoInAddrAny,NoCtldInAddrAny",  # several on one machine
        f"SlurmUser={me}",
        f"SlurmdUser={me}",
        f"StateSaveLocation={folder}/state",
        f"SlurmdSpoolDir={folder}/spool/%n",
        f"SlurmctldPidFile={folder}/state/slurmctld.pid",
        f"SlurmdPidFile={folder}/state/slurmd-%n.pid",
        f"SlurmctldLogFile={folder}/log/slurmctld.log",
        f"SlurmdLogFile={folder}/log/slurmd-%n.log",
        "SlurmctldDebug=info",
        "SlurmdDebug=info",
        # No cgroups, no accounting, no binding to cores.
        "ProctrackType=proctrack/linuxproc",
        "TaskPlugin=task/none",
        "JobAcctGatherType=jobacct_gather/none",
        "AccountingStorageType=accounting_storage/none",
        "JobCompType=jobcomp/filetxt",
        f"JobCompLoc={folder}/log/jobs.txt",
        "MpiDefault=none",
        "SelectType=select/cons_tres",
        "SelectTypeParameters=CR_CPU",
        "SlurmdParameters=config_overrides",  # more CPUs than there are
        "ReturnToService=2",
        "SchedulerType=sched/backfill",
        "SchedulerParameters=batch_sched_delay=0,sched_min_interval=0,sched_interval=2,bf_interval=2",
        f"KillWait={shape.kill_wait}",
        f"SlurmdTimeout={shape.node_timeout}",
        "InactiveLimit=0",
        "MinJobAge=3600",  # jobs that have ended can be asked about
        "MessageTimeout=10",
        "TCPTimeout=2",
        "PropagateResourceLimits=NONE",
        "PreemptType=preempt/partition_prio",
        "PreemptMode=REQUEUE",
        *(["GresTypes=gpu"] if gres else []),
    ]
    for node in shape.names:
        where = f"NodeAddr={shape.address(node)} NodeHostname={node if shape.apart else shape.head}"
        own_port = 6818 if shape.apart else free_port()
        lines.append(f"NodeName={node} {where} Port={own_port} CPUs={shape.cpus} RealMemory={shape.memory} {gres}")
    limits = f"Nodes={','.join(shape.names)} MaxTime=UNLIMITED DefaultTime={shape.time_limit} State=UP"
    lines.append(f"PartitionName=low {limits} Default=YES PriorityTier=1 PreemptMode=REQUEUE GraceTime={shape.grace}")
    lines.append(f"PartitionName=high {limits} PriorityTier=10 PreemptMode=OFF")
    path = folder / "slurm.conf"
    path.write_text("\n".join(lines) + "\n")
    return path


def namespace_script(name: str, folder: Path, share: tuple[str, ...]) -> tuple[str, Path]:
    """(what the first process of a node's namespaces does, the file that it makes once that is done)."""
    private = folder / "private" / name
    ready = private / "ready"
    lines = ["set -e", f"hostname {name}", "ip link set lo up", f"mount --bind '{folder}/hosts' /etc/hosts"]
    for shared in map(str, (folder, *(Path(shared).resolve() for shared in share))):
        if shared.startswith("/tmp/"):
            own = private / "tmp" / shared.removeprefix("/tmp/")
            own.mkdir(parents=True, exist_ok=True)
            lines.append(f"mount --rbind '{shared}' '{own}'")
    (private / "tmp").mkdir(parents=True, exist_ok=True)
    ready.unlink(missing_ok=True)
    lines += ["mount -t tmpfs tmpfs /dev/shm", f"touch '{ready}'", f"mount --rbind '{private}/tmp' /tmp"]
    # The shell stays: the first process of a namespace has to see to orphans that end.
    return "\n".join([*lines, "while :; do sleep 1000 & wait $!; done"]), ready


def missing(apart: bool = False) -> str | None:
    """Why there can be no cluster here; None: there can."""
    for name in (*PROGRAMS, *(("ip", "unshare", "nsenter") if apart else ())):
        if shutil.which(name, path=_PATH) is None:
            return f"no {name}: {INSTALL}"
    if apart and os.geteuid() != 0:
        return "nodes that are apart need root (Linux namespaces)"
    try_it = ["unshare", "--net", "--pid", "--fork", "--mount-proc", "true"]
    if apart and subprocess.run(try_it, capture_output=True).returncode:
        return "nodes that are apart need namespaces, and this machine does not allow them"
    return None
