"""Who names the cause, and with which code launchers leave: decided from what each of them knows, in any order it comes."""

import itertools

import pytest

from megatron_ft.launch.blame import LIMIT, Sureness
from megatron_ft.launch.judge import Judge, Report

SURE, SUSPECT, NOTHING = Sureness.SURE, Sureness.SUSPECT, Sureness.NOTHING


class Clock:
    now = 100.0

    def __call__(self) -> float:
        return self.now


def judge(nodes: int) -> tuple[Judge, Clock]:
    clock = Clock()
    return Judge(nodes, clock), clock


def test_nothing_is_wrong():
    """No launcher reports, and none ends before the last one."""
    one, _ = judge(3)
    for node in (2, 0):
        one.ended(node, Report((0, 75)))
        assert one.news().code is None
    one.ended(1, Report((75, 75)))
    news = one.news()
    assert (news.trouble, news.reporter, news.code) == (False, None, 75)


@pytest.mark.parametrize("order", list(itertools.permutations(range(3))))
def test_the_launcher_with_the_surest_finding_reports(order):
    """It reports even if another one reported a suspect first."""
    one, _ = judge(3)
    findings = {0: SUSPECT, 1: NOTHING, 2: SURE}
    for node in order:
        assert one.news().reporter is None
        one.found(node, findings[node])
        if findings[node] is SURE:
            break
    assert one.news().trouble and one.news().reporter == 2


def test_a_suspect_is_reported_when_all_have_searched():
    one, clock = judge(3)
    one.found(1, SUSPECT)
    one.found(0, NOTHING)
    assert one.news().reporter is None
    one.ended(2, Report((0, 0)))  # its ranks have ended, so it has no suspects
    assert one.news().reporter == 1
    late, clock = judge(2)
    late.found(1, SUSPECT)
    assert late.news().reporter is None
    clock.now += LIMIT + 3
    assert late.news().reporter == 1


def test_a_launcher_that_is_gone():
    """Node 0 reports it if no finding is sure. It counts as exit code 1. A launcher that has sent its exit codes may end."""
    one, _ = judge(3)
    one.ended(2, Report((75,)))
    one.gone(2)
    assert not one.news().trouble and one.lost_nodes == []
    one.gone(1)
    one.found(0, NOTHING)
    assert one.news().trouble and one.news().reporter == 0 and one.lost_nodes == [1]
    one.ended(0, Report((75,), stop_requested=True))
    assert one.news().code == 1


def test_without_a_finding_a_loss_is_reported():
    one, _ = judge(2)
    one.found(0, NOTHING)
    one.found(1, NOTHING)
    assert one.news().reporter is None
    one.ended(0, Report((1,)))
    one.ended(1, Report((1,), lost=True))
    assert one.news().reporter == 1 and one.news().code == 1


@pytest.mark.parametrize(
    "reports, expected",
    [
        ([Report((75, 75), stop_requested=True), Report((75, -9), stop_requested=True)], 1),
        ([Report((75,)), Report((2, 1))], 2),
        ([Report((-15,), stop_requested=True), Report((1,), lost=True)], 75),
        ([Report((1,), interrupted=True), Report((1,))], 130),
    ],
)
def test_one_code_for_all_machines(reports, expected):
    """A run with a rank killed on another machine does not count as saved."""
    one, _ = judge(len(reports))
    one.trouble()
    for node, report in enumerate(reports):
        one.found(node, NOTHING)
        one.ended(node, report)
    assert one.news().code == expected
