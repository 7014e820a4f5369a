"""Scores put together: against numbers worked out by hand."""

import json
import xml.etree.ElementTree as ET

import pytest

from megatron_ft.errors import DataError
from megatron_ft.evaluation.retrieval.page import scores_rows, write_page
from megatron_ft.evaluation.retrieval.results import by_length, compared, normalised, summary


def rows(scores):
    """scores: (task, length, depth) -> scores."""
    return [
        {"task": task, "length": length, "depth": depth, "score": score, "tokens": length - 10}
        for (task, length, depth), many in scores.items()
        for score in many
    ]


HAND = {
    ("lines", 200, 0.0): [1, 0], ("lines", 200, 1.0): [1, 1],
    ("lines", 100, 0.0): [1, 1], ("lines", 100, 1.0): [1, 1],
    ("topics", 100, 0.0): [0, 0], ("topics", 100, 1.0): [1, 0],
    ("topics", 200, 0.0): [0, 0], ("topics", 200, 1.0): [0, 0],
}  # fmt: skip


def test_summary():
    found = summary(rows(HAND))
    assert found["lines"]["200"] == {"score": 0.75, "prompts": 4, "tokens": 190, "depths": {"0": 0.5, "1": 1.0}}
    assert list(found["lines"]) == ["100", "200"] and found["topics"]["100"]["score"] == 0.25
    assert by_length({"tasks": found}, [100, 200]) == [0.625, 0.375]


def test_normalised():
    scores = {"PI": {"x": 0.4, "y": 0.0, "z": 0.5}, "YaRN": {"x": 0.8, "y": 0.0, "z": 0.5}}
    assert normalised(scores, "best") == {"PI": {"x": 0.5, "y": 0, "z": 1}, "YaRN": {"x": 1, "y": 0, "z": 1}}
    assert normalised(scores, "range") == {"PI": {"x": 0, "y": 0, "z": 1}, "YaRN": {"x": 1, "y": 0, "z": 1}}
    assert normalised(scores, "none") == scores


def models(**scores):
    return [{"name": name, "tasks": summary(rows(each))} for name, each in scores.items()]


def test_compared():
    better = {**HAND, ("topics", 100, 0.0): [1, 1]}  # 0.75 instead of 0.25
    first, second = compared(models(A=HAND, B=better), "best")
    assert first["mean"] == (1 + 0.75 + 0.25 + 0) / 4 and second["mean"] == (1 + 0.75 + 0.75 + 0) / 4
    assert first["normalised"] == pytest.approx((1 + 1 + 1 / 3 + 0) / 4) and second["normalised"] == 0.75
    head, lines = scores_rows([first, second])
    assert head == ["", "lines 100", "lines 200", "topics 100", "topics 200", "mean", "normalised"]
    assert lines[0] == ["A", "100.0", "75.0", "25.0", "0.0", "50.0", "58.3"]


def test_models_that_were_asked_something_else():
    less = {key: value for key, value in HAND.items() if key[1] == 100}
    with pytest.raises(DataError, match="B was asked other tasks or lengths than A"):
        compared(models(A=HAND, B=less), "best")
    (first,) = models(A=HAND)
    with pytest.raises(DataError, match="the same name"):
        compared([first, first], "best")


def test_the_page_and_its_figures(tmp_path):
    """Figures are well-formed and hold every number, axis names with units, and names as text."""
    named = {"PI <1>": HAND, "../YaRN": {**HAND, ("lines", 200, 0.0): [1, 1]}}
    result = {"seed": 0, "samples": 2, "max_new_tokens": 9, "normalisation": "best"}
    result["models"] = compared(models(**named), "best")
    page = write_page(tmp_path, json.loads(json.dumps(result))).read_text()
    assert sorted(path.name for path in tmp_path.iterdir()) == [
        "-YaRN-lines.svg", "-YaRN-topics.svg", "PI--1--lines.svg", "PI--1--topics.svg", "comparison.svg", "retrieval.html",
    ]  # fmt: skip
    assert "<1>" not in page and "PI &lt;1&gt;" in page
    texts = svg_texts(tmp_path / "PI--1--lines.svg")
    assert [text for text in texts if text in ("50", "100")].count("50") == 1  # one cell; depths are 0 and 100
    assert {"length (tokens)", "depth of the answer (%)", "100", "200"} <= set(texts)
    assert {"length (tokens)", "right answers (%)", "PI <1>", "../YaRN"} <= set(svg_texts(tmp_path / "comparison.svg"))


def svg_texts(path):
    return [node.text for node in ET.parse(path).iter("{http://www.w3.org/2000/svg}text")]
