"""Communication between the launchers of a run's machines: failures, what each knows of the cause, how its ranks ended.

They connect at --master_addr and --master_port before any rank is started. The launcher of node 0 decides (judge.py), so that one of
them prints the cause and all leave together with one exit code. If one left early, srun would end the others while they save.
If launchers lose each other, each continues as if it were alone.
"""

from __future__ import annotations

import os
import select
import socket
import sys
import time
from collections.abc import Callable
from dataclasses import asdict, replace

from megatron_ft.errors import ConfigError, PassingFault
from megatron_ft.launch.blame import Sureness
from megatron_ft.launch.judge import Judge, News, Report
from megatron_ft.launch.places import Places
from megatron_ft.launch.wire import ConnectionLost, Wire

_MEETING = 600.0  # seconds that the first launcher waits for the last
_REPORT_AFTER = 20.0  # seconds after which a message names the missing launchers
_AGAIN = 0.2  # seconds between two tries


class Alone:
    """The link of a launcher without others. news: the decision, updated by each poll."""

    node = 0

    def __init__(self, nodes: int = 1):
        self._judge = Judge(nodes, time.monotonic)
        self.news = News()

    def poll(self) -> None:
        self.news = self._judge.news()

    def trouble(self) -> None:
        self._judge.trouble()

    def found(self, sureness: Sureness) -> None:
        self._judge.found(self.node, sureness)

    def ended(self, report: Report) -> None:
        self._judge.ended(self.node, report)

    def gone(self) -> str | None:
        """Return a message about launchers that ended without a report, None if there are none."""
        return None

    def close(self) -> None:
        """Close the connections."""


class Hub(Alone):
    """The link of node 0's launcher to all others. wires: connections by node. hosts: their names."""

    def __init__(self, wires: dict[int, Wire], hosts: dict[int, str]):
        super().__init__(1 + len(wires))
        self._wires, self._hosts = dict(wires), hosts

    def poll(self) -> None:
        for node, wire in list(self._wires.items()):
            try:
                for message in wire.receive():
                    self._handle(node, message)
            except ConnectionLost as gone:
                self._lose(node, gone)
        before, self.news = self.news, self._judge.news()
        if self.news != before:
            for node, wire in list(self._wires.items()):
                try:
                    wire.send(asdict(self.news))
                except ConnectionLost as gone:
                    self._lose(node, gone)

    def gone(self) -> str | None:
        names = [f"node {node} ({self._hosts[node]})" for node in self._judge.lost_nodes]
        return (
            f"the launcher of {', '.join(names)} does not respond: it, its machine or its network has failed"
            if names
            else None
        )

    def close(self) -> None:
        for wire in self._wires.values():
            wire.close()

    def _handle(self, node: int, message: dict) -> None:
        match message:
            case {"trouble": True}:
                self._judge.trouble()
            case {"found": str(sureness)}:
                self._judge.found(node, Sureness(sureness))
            case {"ended": dict(report)}:
                self._judge.ended(node, Report(**{**report, "codes": tuple(report["codes"])}))

    def _lose(self, node: int, gone: ConnectionLost) -> None:
        self._wires.pop(node).close()
        self._judge.gone(node)


class Spoke(Alone):
    """The link of another node's launcher to that of node 0. wire: the connection. hub: its address."""

    def __init__(self, node: int, wire: Wire, hub: str):
        super().__init__()
        self.node, self._hub = node, hub
        self._wire: Wire | None = wire
        self._lost = False

    def poll(self) -> None:
        if self._wire is None:
            decided = self._judge.news()
            self.news = replace(decided, reporter=None if decided.reporter is None else self.node)
            return
        try:
            for message in self._wire.receive():
                self.news = News(**message)
        except ConnectionLost as gone:
            self._continue_alone(gone)

    def trouble(self) -> None:
        super().trouble()
        self._send({"trouble": True})

    def found(self, sureness: Sureness) -> None:
        self._judge.found(0, sureness)  # needed if this launcher has to decide alone
        self._send({"found": sureness.value})

    def ended(self, report: Report) -> None:
        self._judge.ended(0, report)
        self._send({"ended": asdict(report)})

    def gone(self) -> str | None:
        return (
            f"the launcher of node 0 ({self._hub}) does not respond: it, its machine or its network has failed"
            if self._lost
            else None
        )

    def close(self) -> None:
        if self._wire is not None:
            self._wire.close()

    def _send(self, message: dict) -> None:
        if self._wire is not None:
            try:
                self._wire.send(message)
            except ConnectionLost as gone:
                self._continue_alone(gone)

    def _continue_alone(self, gone: ConnectionLost) -> None:
        if self.news.code is not None:  # the decision has arrived
            return
        self.close()
        self._wire = None
        if gone.ended:
            self._lost = True
            self._judge.trouble()
        else:
            print(
                f"megatron-ft: warning: node {self.node} cannot reach the launcher of node 0 ({self._hub})",
                file=sys.stderr,
            )


def meet(places: Places, held: socket.socket | None, interrupted: Callable[[], bool]) -> tuple[Places, Alone] | None:
    """Connect to the other launchers of the run. Return the places with the ranks' rendezvous port, and the link to the others.

    held: on node 0, the socket bound to that port. interrupted: returns True if this launcher was asked to stop; then return None.
    Raise ConfigError if the port is in use or the launchers do not match, PassingFault if some do not connect in time.
    """
    if places.nodes == 1:
        return places, Alone()
    if places.node:
        return _as_spoke(places, interrupted)
    assert held is not None
    return _as_hub(places, held, interrupted)


def _identity(places: Places) -> dict:
    """Return the values that must be the same on all machines."""
    job = ".".join(os.environ.get(name, "") for name in ("SLURM_JOB_ID", "SLURM_STEP_ID", "SLURM_RESTART_COUNT"))
    return {"run": job, "nodes": places.nodes, "processes": places.here}


def _as_hub(places: Places, held: socket.socket, interrupted: Callable[[], bool]) -> tuple[Places, Alone] | None:
    wires: dict[int, Wire] = {}
    hosts: dict[int, str] = {}
    deadline = _Deadline()
    with _listening(places.port) as listening:
        while len(wires) < places.nodes - 1:
            if interrupted():
                _refuse_all(wires, None)
                return None
            missing = sorted(set(range(1, places.nodes)) - set(wires))
            who = f"the launcher of node {', '.join(map(str, missing))} at port {places.port} of {socket.gethostname()}"
            if deadline.is_over(who):
                _refuse_all(wires, f"node {', '.join(map(str, missing))} did not connect")
                raise PassingFault(
                    f"{who} did not connect within {_MEETING:.0f} s: check that it is started and that its machine can reach this one"
                )
            if not select.select([listening], [], [], _AGAIN)[0]:
                continue
            wire = Wire(listening.accept()[0])
            if (hello := _hello(wire)) is None:
                wire.close()
                continue
            node, why = hello["node"], _disagreement(places, hello, wires)
            if why:
                _refuse_all({0: wire}, why)
                if (
                    hello.get("run") == _identity(places)["run"]
                ):  # a launcher of this run with wrong flags; one of another run is only refused
                    _refuse_all(wires, why)
                    raise ConfigError(why)
                continue
            wires[node], hosts[node] = wire, str(hello.get("host"))
    port = held.getsockname()[1]
    for node, wire in wires.items():
        try:
            wire.send({"port": port})
        except ConnectionLost as gone:
            raise PassingFault(f"the launcher of node {node} ({hosts[node]}) ended before the run began") from gone
    return replace(places, port=port), Hub(wires, hosts)


def _disagreement(places: Places, hello: dict, wires: dict[int, Wire]) -> str | None:
    mine, its, node = (
        _identity(places),
        {name: hello.get(name) for name in ("run", "nodes", "processes")},
        hello.get("node"),
    )
    who = f"the launcher of node {node} ({hello.get('host')})"
    if its["run"] != mine["run"]:
        return f"port {places.port} of {socket.gethostname()} is used by another run: choose another --master_port"
    if its != mine:
        return (
            f"{who} was started with --nnodes {its['nodes']} --nproc_per_node {its['processes']}, the launcher of node 0 with --nnodes "
            f"{mine['nodes']} --nproc_per_node {mine['processes']}: the values must be the same"
        )
    if node in wires or node == 0:
        return f"two launchers were started with --node_rank {node}: give each machine a different one, from 0 to {places.nodes - 1}"
    return None


def _hello(wire: Wire) -> dict | None:
    """Return the first message of the other end, None if it is not a launcher."""
    until = time.monotonic() + 5
    try:
        while time.monotonic() < until:
            for message in wire.receive():
                return message if isinstance(message.get("node"), int) else None
            time.sleep(0.01)
    except ConnectionLost:
        pass
    return None


def _refuse_all(wires: dict[int, Wire], why: str | None) -> None:
    for wire in wires.values():
        try:
            if why:
                wire.send({"refused": why})
        except ConnectionLost:
            pass
        wire.close()


def _as_spoke(places: Places, interrupted: Callable[[], bool]) -> tuple[Places, Alone] | None:
    hub = f"{places.address}:{places.port}"
    deadline = _Deadline()
    wire = None
    while True:
        if interrupted():
            if wire:
                wire.close()
            return None
        if deadline.is_over(f"the launcher of node 0 at {hub}"):
            raise PassingFault(
                f"no connection to the launcher of node 0 at {hub} within {_MEETING:.0f} s: check that it is started and can be reached"
            )
        try:
            if wire is None:
                wire = Wire(socket.create_connection((places.address, places.port), timeout=5))
                wire.send({"node": places.node, "host": socket.gethostname(), **_identity(places)})
            for message in wire.receive():
                if "refused" in message:
                    raise ConfigError(message["refused"])
                return replace(places, port=int(message["port"])), Spoke(places.node, wire, hub)
        except (OSError, ConnectionLost):  # not started yet
            if wire:
                wire.close()
            wire = None
        time.sleep(_AGAIN)


def _listening(port: int) -> socket.socket:
    try:
        return socket.create_server(
            ("", port), family=socket.AF_INET6 if socket.has_dualstack_ipv6() else socket.AF_INET, backlog=1024,
            dualstack_ipv6=socket.has_dualstack_ipv6(),
        )  # fmt: skip
    except OSError as error:
        raise ConfigError(
            f"port {port} of {socket.gethostname()}, where the launchers of this run connect, cannot be opened ({error.strerror}): "
            f"choose a free one with --master_port or MASTER_PORT"
        ) from error


class _Deadline:
    def __init__(self) -> None:
        self._began = time.monotonic()
        self._announced = False

    def is_over(self, who: str) -> bool:
        """Return True after the time limit. Print once who is missing if it takes long."""
        waited = time.monotonic() - self._began
        if waited > _REPORT_AFTER and not self._announced:
            self._announced = True
            print(f"megatron-ft: waiting for {who}", file=sys.stderr, flush=True)
        return waited > _MEETING
