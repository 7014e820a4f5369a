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
    """Nobody speaks, and nobody leaves before the last has ended."""
    one, _ = judge(3)
    for node in (2, 0):
        one.ended(node, Report((0, 75)))
        assert one.news().code is None
    one.ended(1, Report((75, 75)))
    news = one.news()
    assert (news.trouble, news.reporter, news.code) == (False, None, 75)


@pytest.mark.parametrize("order", list(itertools.permutations(range(3))))
def test_the_surest_speaks(order):
    """A suspect reported first does not keep the one that knows from speaking."""
    one, _ = judge(3)
    told = {0: SUSPECT, 1: NOTHING, 2: SURE}
    for node in order:
        assert one.news().reporter is None
        one.found(node, told[node])
        if told[node] is SURE:
            break
    assert one.news().trouble and one.news().reporter == 2


def test_a_suspect_speaks_once_all_have_looked():
    one, clock = judge(3)
    one.found(1, SUSPECT)
    one.found(0, NOTHING)
    assert one.news().reporter is None
    one.ended(2, Report((0, 0)))  # whose ranks are gone has no suspects
    assert one.news().reporter == 1
    late, clock = judge(2)
    late.found(1, SUSPECT)
    assert late.news().reporter is None
    clock.now += LIMIT + 3
    assert late.news().reporter == 1


def test_a_launcher_that_is_gone():
    """Node 0 speaks of it, where nobody is sure; it counts as 1. One that has reported before may go."""
    one, _ = judge(3)
    one.ended(2, Report((75,)))
    one.gone(2)
    assert not one.news().trouble and one.lost_nodes == []
    one.gone(1)
    one.found(0, NOTHING)
    assert one.news().trouble and one.news().reporter == 0 and one.lost_nodes == [1]
    one.ended(0, Report((75,), stop_requested=True))
    assert one.news().code == 1


def test_where_nobody_knows_a_loss_is_told():
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
    """A rank that was killed elsewhere is not a run that was saved."""
    one, _ = judge(len(reports))
    one.trouble()
    for node, report in enumerate(reports):
        one.found(node, NOTHING)
        one.ended(node, report)
    assert one.news().code == expected
