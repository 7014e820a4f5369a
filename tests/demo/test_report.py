"""The run report: from metrics.jsonl to a page with curves, and nothing fetched from elsewhere."""

import json
import re
from html.parser import HTMLParser

import pytest

from megatron_ft.errors import DataError
from megatron_ft.report import Page, read_metrics
from megatron_ft.report.curves import Line, picture, short
from megatron_ft.report.page import badge, curves, table


def step(iteration: int, **more) -> dict:
    return {
        "iteration": iteration, "train/loss": 5.0 / iteration, "train/lr": 1e-3, "train/grad_norm": 1.0,
        "train/seconds": 0.5, "train/tokens": 1000, "train/supervised_tokens": 400, **more,
    }  # fmt: skip


@pytest.fixture
def path(tmp_path):
    lines = [step(i) for i in range(1, 41)]
    lines += [{"iteration": 40, "eval/loss": 0.2}, {"iteration": 40, "checkpoint": "tuned/iter_0000040"}]
    path = tmp_path / "metrics.jsonl"
    path.write_text("".join(json.dumps(line) + "\n" for line in lines))
    return path


class Balanced(HTMLParser):
    """Fails on a tag that is not closed."""

    def __init__(self):
        super().__init__()
        self.open = []

    def handle_starttag(self, tag, attributes):
        if tag not in ("meta", "br"):
            self.open.append(tag)

    def handle_startendtag(self, tag, attributes):
        pass

    def handle_endtag(self, tag):
        assert self.open.pop() == tag


def test_the_page_has_the_curves_and_needs_no_network(path, tmp_path):
    page = Page("a <run>", "subtitle")
    page.section("Training", curves(read_metrics(path)), table(("", "x"), [("<b>", badge(True))]))
    page.write(tmp_path / "report.html")
    html = (tmp_path / "report.html").read_text()
    line = re.search(r'<path class="line a" d="M([^"]+)"', html)[1].split("L")
    assert len(line) == 40  # every step of the loss
    heights = [float(point.split()[1]) for point in line]
    assert heights == sorted(heights)  # the loss falls, and the picture's y axis points down
    assert "a &lt;run&gt;" in html and "&lt;b&gt;" in html and "checkpoint at 40" in html
    assert not re.search(r"https?://|src=|@import|url\(", html)
    Balanced().feed(html)


def test_rates_and_totals(path):
    metrics = read_metrics(path)
    assert metrics.rate("train/tokens")[0] == (1, 2000.0)
    assert metrics.total("train/supervised_tokens") == 40 * 400
    assert metrics.checkpoints == {40: "tuned/iter_0000040"}


def test_a_resumed_run_counts_once_and_nan_is_counted(path):
    with path.open("a") as file:
        file.write(
            json.dumps(step(40, **{"train/loss": 0.5})) + "\n" + json.dumps(step(41, **{"train/loss": None})) + "\n"
        )
    metrics = read_metrics(path)
    assert metrics.curve("train/loss")[-1] == (40, 0.5) and len(metrics.curve("train/loss")) == 40
    assert metrics.not_finite == 1


def test_a_line_being_written_is_no_fault_a_broken_one_is(path):
    with path.open("a") as file:
        file.write('{"iteration": 41, "tra')
    assert read_metrics(path).curve("train/loss")[-1][0] == 40
    with path.open("a") as file:
        file.write("\n" + json.dumps(step(42)) + "\n")
    with pytest.raises(DataError, match="line 43"):
        read_metrics(path)


def test_no_metrics_yet(tmp_path):
    assert read_metrics(tmp_path / "metrics.jsonl").values("train/loss") == []


@pytest.mark.parametrize("points", [[(1, 2.0)], [(1, 0.0), (2, 0.0)], [(5, -3.0), (9, 4.0)], [(1, 1e-9), (2, 1e9)]])
@pytest.mark.parametrize("log", [False, True])
def test_odd_curves_draw_inside_the_picture(points, log):
    svg = picture("odd", [Line("x", points)], log=log)
    places = [float(n) for d in re.findall(r'class="line a" d="M([^"]+)"', svg) for n in re.split("[ L]", d)]
    assert all(0 <= place <= 520 for place in places)
    assert "nan" not in svg


def test_short_numbers():
    assert [short(x) for x in (0, 5000, 12300, 2.5e6, 0.25, 0.001)] == ["0", "5k", "12.3k", "2.5M", "0.25", "1e-3"]
