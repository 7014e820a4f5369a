"""Decides which launcher of a run reports the cause, and the exit code of all launchers, from the reports of each.

It uses neither processes nor sockets. The launcher of node 0 calls it and sends its decisions to the others.
"""

from __future__ import annotations

import signal
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from megatron_ft.launch.blame import EXIT_REQUEUE, LIMIT, Sureness


@dataclass(frozen=True)
class Report:
    """The report of a launcher after all its ranks have ended.

    codes: of each rank, negative for a signal, 1 if the launcher killed it because of another rank.
    stop_requested: the launcher received a signal to stop other than Ctrl-C. interrupted: it received Ctrl-C.
    lost: one of its ranks reported that it lost another rank.
    """

    codes: tuple[int, ...]
    stop_requested: bool = False
    interrupted: bool = False
    lost: bool = False


@dataclass(frozen=True)
class News:
    """The decision sent to all launchers. reporter: node that prints the cause. code: exit code with which all launchers leave."""

    trouble: bool = False
    reporter: int | None = None
    code: int | None = None


class Judge:
    """Collects the reports of the launchers and decides. nodes: number of launchers. clock: seconds."""

    def __init__(self, nodes: int, clock: Callable[[], float]):
        self._nodes, self._clock = nodes, clock
        self._found: dict[int, Sureness] = {}
        self._reports: dict[int, Report] = {}
        self._gone: set[int] = set()
        self._since: float | None = None
        """Time when trouble began."""
        self._reporter: int | None = None

    def trouble(self) -> None:
        """Record that a launcher has seen a failure."""
        if self._since is None:
            self._since = self._clock()

    def found(self, node: int, sureness: Sureness) -> None:
        """Record how certain a launcher is about the cause."""
        self.trouble()
        self._found[node] = sureness

    def ended(self, node: int, report: Report) -> None:
        """Record that all ranks of a node have ended."""
        self._reports[node] = report

    def gone(self, node: int) -> None:
        """Record that a launcher does not respond any more. That is a failure unless it has sent its report."""
        if node not in self._reports:
            self._gone.add(node)
            self.trouble()

    @property
    def lost_nodes(self) -> list[int]:
        """Return the nodes whose launchers ended without a report."""
        return sorted(self._gone)

    def news(self) -> News:
        """Return the decision at this time."""
        if self._reporter is None:
            self._reporter = self._choose()
        code = None
        if len(self._reports) + len(self._gone) == self._nodes and (self._since is None or self._reporter is not None):
            code = self._code()
        return News(self._since is not None, self._reporter, code)

    def _choose(self) -> int | None:
        """Return the node that is sure; if none is, choose only after all have looked. Node 0 reports launchers that are gone."""
        if self._since is None:
            return None
        if sure := _nodes(self._found, Sureness.SURE):
            return sure[0]
        all_have_looked = len({*self._found, *self._gone, *self._reports}) == self._nodes
        if not all_have_looked and self._clock() - self._since < LIMIT + 2:
            return None
        if self._gone:
            return 0
        if suspects := _nodes(self._found, Sureness.SUSPECT):
            return suspects[0]
        if len(self._reports) == self._nodes:
            return min((node for node, report in self._reports.items() if report.lost), default=0)
        return None

    def _code(self) -> int:
        reports = self._reports.values()
        codes = [code for report in reports for code in report.codes] + [1] * len(self._gone)
        return exit_code(
            codes, any(report.stop_requested for report in reports), any(report.interrupted for report in reports)
        )


def exit_code(codes: Sequence[int], stop_requested: bool, interrupted: bool = False) -> int:
    """Return the exit code of a run: 2 before 130 before 1 before 75; 75 also if a signal ended ranks before they could save.

    codes, stop_requested, interrupted: as in Report.
    """
    requests = {-signal.SIGTERM, -signal.SIGUSR1}
    if 2 in codes:
        return 2
    if {-signal.SIGINT, 130} & set(codes) or (interrupted and any(codes)):
        return 130
    if (
        stop_requested and requests & set(codes) and set(codes) <= {0, 1, EXIT_REQUEUE, *requests}
    ):  # before there was anything to save
        return EXIT_REQUEUE
    if set(codes) <= {0, EXIT_REQUEUE}:
        return EXIT_REQUEUE if EXIT_REQUEUE in codes else 0
    return 1


def _nodes(found: dict[int, Sureness], which: Sureness) -> list[int]:
    return sorted(node for node, sureness in found.items() if sureness is which)
