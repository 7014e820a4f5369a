"""Who speaks, and with which exit code all launchers of a run end: decided at one place from what each of them knows.

Knows nothing of processes or sockets. The launcher of node 0 feeds it, and tells the others what it says.
"""

from __future__ import annotations

import signal
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from megatron_ft.launch.blame import EXIT_REQUEUE, LIMIT, Sureness


@dataclass(frozen=True)
class Report:
    """What a launcher has to say once all its ranks have ended.

    codes: of each rank, negative for a signal, 1 where the launcher killed it because of another. asked: told to stop by a signal other
    than Ctrl-C. interrupted: Ctrl-C. lost: it has a rank's word that another one is gone, to be said where nobody knows more.
    """

    codes: tuple[int, ...]
    asked: bool = False
    interrupted: bool = False
    lost: bool = False


@dataclass(frozen=True)
class News:
    """What launchers are told. speaker: the node that is to name the cause. code: leave, all with this one."""

    trouble: bool = False
    speaker: int | None = None
    code: int | None = None


class Judge:
    """nodes: how many launchers there are. clock: s."""

    def __init__(self, nodes: int, clock: Callable[[], float]):
        self._nodes, self._clock = nodes, clock
        self._found: dict[int, Sureness] = {}
        self._reports: dict[int, Report] = {}
        self._gone: set[int] = set()
        self._since: float | None = None
        """When trouble began."""
        self._speaker: int | None = None

    def trouble(self) -> None:
        """A launcher sees that something is wrong."""
        if self._since is None:
            self._since = self._clock()

    def found(self, node: int, sureness: Sureness) -> None:
        """What a launcher knows of the cause."""
        self.trouble()
        self._found[node] = sureness

    def ended(self, node: int, report: Report) -> None:
        """All ranks of a node have ended."""
        self._reports[node] = report

    def gone(self, node: int) -> None:
        """A launcher does not answer any more; where it had not reported, that is trouble."""
        if node not in self._reports:
            self._gone.add(node)
            self.trouble()

    @property
    def lost_nodes(self) -> list[int]:
        """Launchers that went without a report."""
        return sorted(self._gone)

    def news(self) -> News:
        """What is decided now."""
        if self._speaker is None:
            self._speaker = self._choose()
        code = None
        if len(self._reports) + len(self._gone) == self._nodes and (self._since is None or self._speaker is not None):
            code = self._code()
        return News(self._since is not None, self._speaker, code)

    def _choose(self) -> int | None:
        """The surest; where none is sure, only once all have looked. The launcher that decides speaks of those that are gone."""
        if self._since is None:
            return None
        if sure := _nodes(self._found, Sureness.SURE):
            return sure[0]
        everybody = len({*self._found, *self._gone, *self._reports}) == self._nodes
        if not everybody and self._clock() - self._since < LIMIT + 2:
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
        return exit_code(codes, any(report.asked for report in reports), any(report.interrupted for report in reports))


def exit_code(codes: Sequence[int], asked: bool, interrupted: bool = False) -> int:
    """One for all ranks of a run: 2 before 130 before 1 before 75; 75 too for ranks that a signal ended before they could save.

    codes, asked, interrupted: as in Report.
    """
    told = {-signal.SIGTERM, -signal.SIGUSR1}
    if 2 in codes:
        return 2
    if {-signal.SIGINT, 130} & set(codes) or (interrupted and any(codes)):
        return 130
    if asked and told & set(codes) and set(codes) <= {0, 1, EXIT_REQUEUE, *told}:  # before there was anything to save
        return EXIT_REQUEUE
    if set(codes) <= {0, EXIT_REQUEUE}:
        return EXIT_REQUEUE if EXIT_REQUEUE in codes else 0
    return 1


def _nodes(found: dict[int, Sureness], which: Sureness) -> list[int]:
    return sorted(node for node, sureness in found.items() if sureness is which)
