"""What the launchers of a run's machines tell each other: that something is wrong, what each knows of the cause, how its ranks ended.

They meet at --master_addr and --master_port before any rank is started. The launcher of node 0 decides (judge.py), so that one of
them names the cause and all leave together, with one exit code: whoever left early would have srun end the others while they save.
Where launchers lose each other, each goes on as if it were alone.
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
from megatron_ft.launch.wire import Gone, Wire

_MEETING = 600.0  # seconds that the first launcher waits for the last
_WORTH_A_WORD = 20.0  # seconds, and it is said who is waited for
_AGAIN = 0.2  # seconds between two tries


class Alone:
    """A launcher that has no others to ask. news: what is decided, anew at each poll."""

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
        """Which launchers went without a word; None: none."""
        return None

    def close(self) -> None:
        """No more is said or heard."""


class Hub(Alone):
    """The launcher of node 0. wires: to the others, by node; hosts: their names."""

    def __init__(self, wires: dict[int, Wire], hosts: dict[int, str]):
        super().__init__(1 + len(wires))
        self._wires, self._hosts = dict(wires), hosts

    def poll(self) -> None:
        for node, wire in list(self._wires.items()):
            try:
                for message in wire.receive():
                    self._hear(node, message)
            except Gone as gone:
                self._lose(node, gone)
        before, self.news = self.news, self._judge.news()
        if self.news != before:
            for node, wire in list(self._wires.items()):
                try:
                    wire.send(asdict(self.news))
                except Gone as gone:
                    self._lose(node, gone)

    def gone(self) -> str | None:
        names = [f"node {node} ({self._hosts[node]})" for node in self._judge.lost_nodes]
        return (
            f"the launcher of {', '.join(names)} is gone: it, its machine or its network has failed" if names else None
        )

    def close(self) -> None:
        for wire in self._wires.values():
            wire.close()

    def _hear(self, node: int, message: dict) -> None:
        match message:
            case {"trouble": True}:
                self._judge.trouble()
            case {"found": str(word)}:
                self._judge.found(node, Sureness(word))
            case {"ended": dict(report)}:
                self._judge.ended(node, Report(**{**report, "codes": tuple(report["codes"])}))

    def _lose(self, node: int, gone: Gone) -> None:
        self._wires.pop(node).close()
        self._judge.gone(node)


class Spoke(Alone):
    """The launcher of another node. wire: to node 0's, whose name is hub."""

    def __init__(self, node: int, wire: Wire, hub: str):
        super().__init__()
        self.node, self._hub = node, hub
        self._wire: Wire | None = wire
        self._lost = False

    def poll(self) -> None:
        if self._wire is None:
            decided = self._judge.news()
            self.news = replace(decided, speaker=None if decided.speaker is None else self.node)
            return
        try:
            for message in self._wire.receive():
                self.news = News(**message)
        except Gone as gone:
            self._go_on_alone(gone)

    def trouble(self) -> None:
        super().trouble()
        self._tell({"trouble": True})

    def found(self, sureness: Sureness) -> None:
        self._judge.found(0, sureness)  # kept for the case that it has to decide alone
        self._tell({"found": sureness.value})

    def ended(self, report: Report) -> None:
        self._judge.ended(0, report)
        self._tell({"ended": asdict(report)})

    def gone(self) -> str | None:
        return (
            f"the launcher of node 0 ({self._hub}) is gone: it, its machine or its network has failed"
            if self._lost
            else None
        )

    def close(self) -> None:
        if self._wire is not None:
            self._wire.close()

    def _tell(self, message: dict) -> None:
        if self._wire is not None:
            try:
                self._wire.send(message)
            except Gone as gone:
                self._go_on_alone(gone)

    def _go_on_alone(self, gone: Gone) -> None:
        if self.news.code is not None:  # it had said all
            return
        self.close()
        self._wire = None
        if gone.ended:
            self._lost = True
            self._judge.trouble()
        else:
            print(
                f"megatron-ft: warning: node {self.node} does not reach the launcher of node 0 ({self._hub})",
                file=sys.stderr,
            )


def meet(places: Places, held: socket.socket | None, interrupted: Callable[[], bool]) -> tuple[Places, Alone] | None:
    """Find the other launchers of the run; returns the places with the port where ranks meet, and the link to the others.

    held: on node 0, what holds that port. interrupted: whether this launcher was told to stop meanwhile; then None is returned.
    Raises ConfigError where the port is another program's or the launchers do not belong together, PassingFault where some do not come.
    """
    if places.nodes == 1:
        return places, Alone()
    if places.node:
        return _as_spoke(places, interrupted)
    assert held is not None
    return _as_hub(places, held, interrupted)


def _card(places: Places) -> dict:
    """What has to be the same on all machines."""
    job = ".".join(os.environ.get(name, "") for name in ("SLURM_JOB_ID", "SLURM_STEP_ID", "SLURM_RESTART_COUNT"))
    return {"run": job, "nodes": places.nodes, "processes": places.here}


def _as_hub(places: Places, held: socket.socket, interrupted: Callable[[], bool]) -> tuple[Places, Alone] | None:
    wires: dict[int, Wire] = {}
    hosts: dict[int, str] = {}
    patience = _Patience()
    with _listening(places.port) as listening:
        while len(wires) < places.nodes - 1:
            if interrupted():
                _refuse_all(wires, None)
                return None
            missing = sorted(set(range(1, places.nodes)) - set(wires))
            who = f"the launcher of node {', '.join(map(str, missing))} at port {places.port} of {socket.gethostname()}"
            if patience.is_over(who):
                _refuse_all(wires, f"node {', '.join(map(str, missing))} did not come")
                raise PassingFault(
                    f"{_MEETING:.0f} s have passed without {who}: is it started there, can that machine reach this one?"
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
                    hello.get("run") == _card(places)["run"]
                ):  # one of ours, wrongly started; another run's is not our concern
                    _refuse_all(wires, why)
                    raise ConfigError(why)
                continue
            wires[node], hosts[node] = wire, str(hello.get("host"))
    port = held.getsockname()[1]
    for node, wire in wires.items():
        try:
            wire.send({"port": port})
        except Gone as gone:
            raise PassingFault(
                f"the launcher of node {node} ({hosts[node]}) is gone before the run has begun"
            ) from gone
    return replace(places, port=port), Hub(wires, hosts)


def _disagreement(places: Places, hello: dict, wires: dict[int, Wire]) -> str | None:
    mine, its, node = (
        _card(places),
        {name: hello.get(name) for name in ("run", "nodes", "processes")},
        hello.get("node"),
    )
    who = f"the launcher of node {node} ({hello.get('host')})"
    if its["run"] != mine["run"]:
        return f"port {places.port} of {socket.gethostname()} is where another run meets: name another --master_port"
    if its != mine:
        return (
            f"{who} was started with --nnodes {its['nodes']} --nproc_per_node {its['processes']}, that of node 0 with --nnodes "
            f"{mine['nodes']} --nproc_per_node {mine['processes']}: they have to be the same"
        )
    if node in wires or node == 0:
        return f"two launchers were started with --node_rank {node}: each machine needs another one, from 0 to {places.nodes - 1}"
    return None


def _hello(wire: Wire) -> dict | None:
    """What the other end says first; None where that is no launcher."""
    until = time.monotonic() + 5
    try:
        while time.monotonic() < until:
            for message in wire.receive():
                return message if isinstance(message.get("node"), int) else None
            time.sleep(0.01)
    except Gone:
        pass
    return None


def _refuse_all(wires: dict[int, Wire], why: str | None) -> None:
    for wire in wires.values():
        try:
            if why:
                wire.send({"refused": why})
        except Gone:
            pass
        wire.close()


def _as_spoke(places: Places, interrupted: Callable[[], bool]) -> tuple[Places, Alone] | None:
    hub = f"{places.address}:{places.port}"
    patience = _Patience()
    wire = None
    while True:
        if interrupted():
            if wire:
                wire.close()
            return None
        if patience.is_over(f"the launcher of node 0 at {hub}"):
            raise PassingFault(
                f"{_MEETING:.0f} s without the launcher of node 0 at {hub}: is it started, can this machine reach it?"
            )
        try:
            if wire is None:
                wire = Wire(socket.create_connection((places.address, places.port), timeout=5))
                wire.send({"node": places.node, "host": socket.gethostname(), **_card(places)})
            for message in wire.receive():
                if "refused" in message:
                    raise ConfigError(message["refused"])
                return replace(places, port=int(message["port"])), Spoke(places.node, wire, hub)
        except (OSError, Gone):  # not there yet
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
            f"port {port} of {socket.gethostname()}, where the launchers of this run are to meet, cannot be had ({error.strerror}): "
            f"name a free one with --master_port or MASTER_PORT"
        ) from error


class _Patience:
    def __init__(self) -> None:
        self._began = time.monotonic()
        self._told = False

    def is_over(self, who: str) -> bool:
        """Whether one has waited long enough. Once it takes a while, says for whom."""
        waited = time.monotonic() - self._began
        if waited > _WORTH_A_WORD and not self._told:
            self._told = True
            print(f"megatron-ft: waiting for {who}", file=sys.stderr, flush=True)
        return waited > _MEETING
