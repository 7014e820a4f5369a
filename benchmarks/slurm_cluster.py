"""A real SLURM of several nodes on this one machine, in a folder of its own: for tests, campaigns, and to try a batch script.

    python benchmarks/slurm_cluster.py up FOLDER [--nodes 2] [--gpus 0] [--cpus 8] [--apart] [--share FOLDER]
    python benchmarks/slurm_cluster.py run FOLDER WORDS...        a command against it: sbatch, squeue, scontrol, ...
    python benchmarks/slurm_cluster.py wait FOLDER JOB SECONDS    until it has ended: prints its state and exit code
    python benchmarks/slurm_cluster.py kill|start|cut|mend FOLDER NODE
    python benchmarks/slurm_cluster.py down FOLDER                end all of it; the folder stays

Needs SLURM's own programs and munge (Debian 12: apt-get install --no-install-recommends slurmctld slurmd slurm-client munge).
Nothing is installed, started or written outside the folder: no service, no system user, nothing in /etc.

Plain, as any user: the nodes are called 127.0.0.1, 127.0.0.2, ..., names that resolve everywhere; they share /tmp and localhost.
Apart, as root: node1, node2, ... each with a host name, processes, a /tmp and a network of its own, so that what works only
because all is one machine fails here as on a cluster. What jobs write has to lie in the folder or in one that is shared.

Partitions: low (the default; requeued, a grace after SIGTERM, when a job in high wants its nodes) and high.
"""

from __future__ import annotations

import argparse
import atexit
import contextlib
import json
import os
import re
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from benchmarks.slurm_conf import Shape, configure, missing, namespace_script
from benchmarks.slurm_processes import Process, children, command, environment, environments

ENDED = {
    "BOOT_FAIL", "CANCELLED", "COMPLETED", "DEADLINE", "FAILED", "NODE_FAIL", "OUT_OF_MEMORY", "PREEMPTED", "TIMEOUT",
}  # fmt: skip
"""Job states that stay."""
_LONGEST_FOLDER = 80  # characters: munge's socket lies in it, and a socket's path has at most 107


class ClusterError(Exception):
    """Something did not come up, or did not end in time."""


class Cluster:
    """A context manager: up on entry, all of it ended on exit. Raises ClusterError where it does not come up.

    folder: gets its configuration, state and logs. Ended too when the process that entered it is killed.
    """

    def __init__(self, folder: Path, **shape):
        self.folder = Path(folder).resolve()
        self.shape = Shape(**shape)
        self._processes: dict[str, Process] = {}
        self.nodes, self.head = self.shape.names, self.shape.head

    @classmethod
    def at(cls, folder: Path) -> Cluster:
        """One that another process has started to outlive it."""
        file = Path(folder) / "cluster.json"
        if not file.is_file():
            raise ClusterError(f"{folder}: no cluster was started there")
        saved = json.loads(file.read_text())
        cluster = cls(folder, **saved["shape"])
        cluster._processes = {name: Process(*process) for name, process in saved["processes"].items()}
        return cluster

    def __enter__(self) -> Cluster:
        atexit.register(self.down)
        (self.folder / "log").mkdir(parents=True, exist_ok=True)
        self._save()
        guard = [sys.executable, __file__, "guard", str(self.folder)]
        self._guard = subprocess.Popen(guard, stdin=subprocess.PIPE, start_new_session=True)
        try:
            self.up()
        except BaseException:
            self.down()
            raise
        return self

    def __exit__(self, *_) -> None:
        self.down()
        atexit.unregister(self.down)
        self._guard.communicate(timeout=30)

    # The whole of it

    def up(self) -> None:
        if why := missing(self.shape.apart):
            raise ClusterError(why)
        if len(str(self.folder)) > _LONGEST_FOLDER:
            raise ClusterError(
                f"{self.folder}: too long a path for a socket in it, at most {_LONGEST_FOLDER} characters"
            )
        for name in ("log", "state", "spool", "munge", "jobs", "dev"):
            (self.folder / name).mkdir(parents=True, exist_ok=True)
        # munge refuses a socket below a folder that others may not enter, and a key that others may read.
        self.folder.chmod(0o755)
        (self.folder / "munge").chmod(0o700)
        self._munge()
        if self.shape.apart:
            self._lay_cables()
        configure(self.shape, self.folder)
        self._start("slurmctld", self.head, "slurmctld", "-D", "-c", "-f", str(self._conf))
        for node in self.nodes:
            self.start(node)
        self._until(lambda: self._idle() == self.shape.nodes, 60, "the nodes do not come up")

    def down(self) -> None:
        """End the jobs, then all processes; what does not end is killed. Raises nothing."""
        if self._alive("slurmctld"):
            with contextlib.suppress(ClusterError, subprocess.SubprocessError):
                self.run("scancel", "--signal=KILL", "--full", "--user", str(os.geteuid()), seconds=10)
                self.run("scancel", "--user", str(os.geteuid()), seconds=10)
        names = sorted(self._processes, key=lambda name: name.startswith("holder"))
        for name in names:
            if not name.startswith("holder"):
                self._processes[name].send(signal.SIGTERM)
        deadline = time.monotonic() + 5
        while time.monotonic() < deadline and any(self._alive(n) for n in names if not n.startswith("holder")):
            time.sleep(0.05)
        for name in names:
            self._processes[name].send(signal.SIGKILL)
        for process in self._left():  # a slurmstepd outlives its slurmd
            process.send(signal.SIGKILL)
        deadline = time.monotonic() + 5
        while time.monotonic() < deadline and any(map(self._alive, names)):
            time.sleep(0.05)
        self._processes = {}
        self._save()

    # Jobs

    def run(self, *words, seconds: float = 60, on: str | None = None, **options) -> subprocess.CompletedProcess:
        """A command against this cluster, on its head or on a node. Raises subprocess.TimeoutExpired.

        options: of subprocess.run; text is captured unless they say otherwise.
        """
        options = {"capture_output": True, "text": True, **options}
        environment = options.pop("env", None) or os.environ
        inside = self._inside(on or self.head, options.pop("cwd", None) or os.getcwd())
        return subprocess.run(
            [*inside, *map(str, words)], env=self._environment(environment), timeout=seconds, **options
        )

    def submit(self, script, *args, cwd: Path | None = None, env: dict | None = None, **options) -> str:
        """sbatch; returns the job's number. options: sbatch's own, nodes=2 for --nodes=2.

        What the script prints goes to a file of its own in the folder, see output(), unless it is said where.
        Raises ClusterError where sbatch refuses.
        """
        options = {
            "output": self.folder / "jobs" / "%A_%a.out" if "array" in options else self.folder / "jobs" / "%j.out"
        } | options
        words = [
            f"--{name.replace('_', '-')}" + ("" if value is True else f"={value}") for name, value in options.items()
        ]
        done = self.run(
            "sbatch", "--parsable", *words, script, *args, cwd=cwd or self.folder, env={**os.environ, **(env or {})}
        )
        if done.returncode:
            raise ClusterError(f"sbatch: {done.stderr.strip()}")
        return done.stdout.strip().split(";")[0]

    def show(self, job: str) -> dict[str, str]:
        """scontrol's fields of a job, of the first task of an array. Empty: SLURM does not know it, or does not answer."""
        done = self.run("scontrol", "-o", "show", "job", job)
        return dict(re.findall(r"(?:^|\s)([A-Za-z/:]+)=(\S*)", (done.stdout.splitlines() or [""])[0]))

    def state(self, job: str) -> str:
        return self.show(job).get("JobState", "")

    def wait(self, job: str, seconds: float) -> tuple[str, str]:
        """Until a job has ended for good: (state, exit code as scontrol shows it, "75:0"). Raises ClusterError after `seconds`."""
        self.wait_for(job, lambda fields: fields.get("JobState") in ENDED, seconds, "has not ended")
        fields = self.show(job)
        return fields["JobState"], fields["ExitCode"]

    def wait_for(
        self, job: str, what: Callable[[dict[str, str]], bool], seconds: float, else_say: str
    ) -> dict[str, str]:
        """Until scontrol's fields of a job are as wanted; returns them. Raises ClusterError after `seconds`."""
        deadline = time.monotonic() + seconds
        while not what(fields := self.show(job)):
            if time.monotonic() > deadline:
                facts = {name: fields.get(name) for name in ("JobState", "Reason", "Restarts", "ExitCode")}
                raise ClusterError(f"job {job} {else_say} after {seconds:g} s: {facts}\n{self.output(job)[-4000:]}")
            time.sleep(0.1)
        return fields

    def output(self, job: str) -> str:
        """What a job's script has printed, all its restarts."""
        with contextlib.suppress(OSError):
            return (self.folder / "jobs" / f"{job}.out").read_text(errors="replace")
        return ""

    def processes(self, job: str, node: str | None = None, step: str | None = "0") -> list[int]:
        """Process numbers, as this machine counts, of a step's tasks and what they started; of one node or all.

        step None: the batch script too.
        """
        wanted = {"SLURM_CONF": str(self._conf), "SLURM_JOB_ID": job}
        wanted |= {"SLURMD_NODENAME": node} if node else {}
        wanted |= {"SLURM_STEP_ID": step} if step else {}
        return [pid for pid, found in environments() if wanted.items() <= found.items()]

    # Nodes

    def kill(self, node: str, number: int = signal.SIGKILL) -> None:
        """A node's slurmd; its jobs' processes go on."""
        self._processes[f"slurmd-{node}"].send(number)

    def start(self, node: str) -> None:
        """A node's slurmd, where it does not run."""
        if not self._alive(name := f"slurmd-{node}"):
            self._start(name, node, "slurmd", "-D", "-N", node, "-f", str(self._conf))

    def cut(self, node: str) -> None:
        """Take a node's network away, nothing else. Only where nodes are apart."""
        self._link(node, "down")

    def mend(self, node: str) -> None:
        self._link(node, "up")

    def ready(self, seconds: float = 60) -> None:
        """Until all nodes are idle again. Raises ClusterError."""
        self._until(lambda: self._idle() == self.shape.nodes, seconds, "the nodes are not idle again")

    def _link(self, node: str, state: str) -> None:
        if not self.shape.apart:
            raise ClusterError("only nodes that are apart have a network of their own")
        self._must("ip", "link", "set", f"v{self.nodes.index(node) + 1}", state)

    def _idle(self) -> int:
        found = self.run("sinfo", "-h", "-p", "low", "-t", "idle", "-o", "%D").stdout.strip()
        return int(found or 0)

    # Parts

    @property
    def _conf(self) -> Path:
        return self.folder / "slurm.conf"

    def _environment(self, base) -> dict[str, str]:
        kept = {name: value for name, value in base.items() if not name.startswith(("SLURM_", "SLURMD_", "SBATCH_"))}
        return kept | {"SLURM_CONF": str(self._conf), "PATH": kept.get("PATH", os.defpath) + ":/usr/sbin:/sbin"}

    def _inside(self, name: str, cwd: str | Path = "/") -> list[str]:
        holder = self._processes.get(f"holder-{name}")
        kinds = ("--net", "--uts", "--mount", "--pid")
        return ["nsenter", "-t", str(holder.pid), *kinds, f"--wdns={cwd}"] if holder else []

    def _start(self, name: str, where: str, *words: str) -> None:
        """In the background, in a session of its own."""
        with (self.folder / "log" / "start.log").open("ab") as log:
            started = subprocess.Popen(
                [*self._inside(where), *words], env=self._environment(os.environ), stdin=subprocess.DEVNULL,
                stdout=log, stderr=log, start_new_session=True,
            )  # fmt: skip
        pid = started.pid
        started.returncode = 0  # waited for by its number
        if self._inside(where) or words[0] == "unshare":  # the first of the namespace is its child
            self._until(lambda: children(pid), 10, f"{name} does not start")
            pid = children(pid)[0]
        self._processes[name] = Process.of(pid) or self._fail(f"{name} does not start")
        self._save()

    def _munge(self) -> None:
        key = self.folder / "munge" / "key"
        if not key.exists():
            key.touch(mode=0o600)
            key.write_bytes(os.urandom(128))
        log = self.folder / "log" / "munged.log"
        self._start(
            "munged", "", "munged", "--foreground", "--force", f"--key-file={key}", f"--socket={self.folder}/munge.socket",
            f"--pid-file={self.folder}/munge/pid", f"--log-file={log}", f"--seed-file={self.folder}/munge/seed", "--num-threads=2",
        )  # fmt: skip
        self._until((self.folder / "munge.socket").exists, 10, "munged does not start")

    def _lay_cables(self) -> None:
        """Namespaces for the head and the nodes, and a bridge between them."""
        addresses = {"localhost": "127.0.0.1", "head": "10.77.0.1"} | {
            node: self.shape.address(node) for node in self.nodes
        }
        (self.folder / "hosts").write_text("".join(f"{address} {name}\n" for name, address in addresses.items()))
        for name in ("head", *self.nodes):
            self._hold(name)
        self._must("ip", "link", "add", "bridge", "type", "bridge")
        self._must("ip", "addr", "add", "10.77.0.1/24", "dev", "bridge")
        self._must("ip", "link", "set", "bridge", "up")
        for n, node in enumerate(self.nodes, 1):
            # The pair is made in one namespace, and one end moved.
            there = str(self._processes[f"holder-{node}"].pid)
            self._must("ip", "link", "add", f"v{n}", "type", "veth", "peer", "name", f"p{n}")
            head = str(self._processes["holder-head"].pid)
            move = ["ip", "link", "set", f"p{n}", "netns", there]
            subprocess.run(["nsenter", "-t", head, "--net", *move], check=True)
            self._must("ip", "link", "set", f"v{n}", "master", "bridge", "up")
            self._must("ip", "link", "set", f"p{n}", "name", "eth0", on=node)
            self._must("ip", "addr", "add", f"{self.shape.address(node)}/24", "dev", "eth0", on=node)
            self._must("ip", "link", "set", "eth0", "up", on=node)

    def _hold(self, name: str) -> None:
        """A process that keeps a node's namespaces alive, and whose end is the end of all that runs in them."""
        script, ready = namespace_script(name, self.folder, self.shape.share)
        kinds = ("--net", "--uts", "--mount", "--pid", "--fork", "--kill-child", "--mount-proc")
        self._start(f"holder-{name}", "", "unshare", *kinds, "bash", "-c", script)
        self._until(ready.exists, 10, f"no namespaces for {name}")

    def _must(self, *words: str, on: str = "head") -> None:
        done = self.run(*words, on=on)
        if done.returncode:
            raise ClusterError(f"{' '.join(words)}: {done.stderr.strip()}")

    def _until(self, what: Callable[[], object], seconds: float, else_say: str) -> None:
        deadline = time.monotonic() + seconds
        while not what():
            if time.monotonic() > deadline:
                self._fail(else_say)
            time.sleep(0.05)

    def _fail(self, why: str):
        logs = [self.folder / "log" / name for name in ("start.log", "slurmctld.log", "munged.log")]
        tails = [line for log in logs if log.exists() for line in log.read_text(errors="replace").splitlines()[-4:]]
        raise ClusterError("\n  ".join([f"{why}; see {self.folder}/log", *tails]))

    def _alive(self, name: str) -> bool:
        return name in self._processes and self._processes[name].alive()

    def _left(self) -> list[Process]:
        """SLURM's processes for jobs, and the jobs' own, by their environment."""
        mine, conf = {os.getpid(), os.getppid()}, str(self._conf)
        ours = [pid for pid, found in environments() if found.get("SLURM_CONF") == conf and pid not in mine]
        ours = [pid for pid in ours if "SLURM_JOB_ID" in environment(pid) or command(pid).startswith("slurm")]
        return [process for pid in ours if (process := Process.of(pid))]

    def _save(self) -> None:
        processes = {name: (process.pid, process.began) for name, process in self._processes.items()}
        text = json.dumps({"shape": asdict(self.shape), "processes": processes}, indent=1)
        (self.folder / "cluster.json").write_text(text)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    commands = parser.add_subparsers(dest="action", required=True)
    up = commands.add_parser("up")
    up.add_argument("folder", type=Path)
    for name in ("nodes", "gpus", "cpus", "grace", "kill_wait", "requeue_delay", "node_timeout"):
        up.add_argument(f"--{name}", type=int, default=getattr(Shape, name))
    up.add_argument("--apart", action="store_true")
    up.add_argument("--share", action="append", default=[])
    for action in ("down", "guard", "run", "wait", "kill", "start", "cut", "mend"):
        one = commands.add_parser(action)
        one.add_argument("folder", type=Path)
        if action not in ("down", "guard"):
            one.add_argument("words", nargs=argparse.REMAINDER)
    asked = vars(parser.parse_args())
    action, folder, words = asked.pop("action"), asked.pop("folder"), asked.pop("words", [])
    try:
        if action == "up":
            cluster = Cluster(folder, **asked | {"share": tuple(asked["share"])})
            with contextlib.ExitStack() as undo:
                undo.callback(cluster.down)
                cluster.up()
                undo.pop_all()
            print(f"export SLURM_CONF={cluster.folder}/slurm.conf")
            return 0
        if action == "guard":  # the one that started it is gone once nobody holds the other end
            sys.stdin.buffer.read()
        cluster = Cluster.at(folder)
        if action == "run":
            return cluster.run(*words, capture_output=False, seconds=None).returncode
        if action == "wait":
            print(*cluster.wait(words[0], float(words[1])))
        else:
            getattr(cluster, "down" if action == "guard" else action)(*words)
        return 0
    except ClusterError as error:
        print(f"slurm_cluster: {error}", file=sys.stderr)
        return 1


if __name__ == "__main__":
    sys.exit(main())
