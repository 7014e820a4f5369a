"""The section of answers of a run's page, and the table for wandb."""

import html
import json
import re
from types import SimpleNamespace

import pytest

from megatron_ft.errors import DataError
from megatron_ft.report.answers import answers, read_answers
from megatron_ft.training.hooks import SamplesFile
from megatron_ft.training.samples import COLUMNS, Sample, earlier, summary
from megatron_ft.training.wandb_hook import WeightsAndBiases
from tests.demo.test_report import Balanced


def asked(text):
    return [{"role": "user", "content": text}]


def samples(plum):
    return [
        Sample(asked("fig?"), "red", "red"),
        Sample(asked("<free>"), "anything"),
        Sample(asked("plum?"), plum, "blue"),
    ]


def test_failures_come_first_and_the_later_answer_counts(tmp_path):
    file = SamplesFile(tmp_path)
    for iteration, plum in ((0, "none"), (5, "early"), (5, " blue\n"), (10, "green"), (15, "grey"), (20, "<pink>")):
        file.on_samples(iteration, samples(plum))
    page = "".join(answers(read_answers(tmp_path / "samples.jsonl")))
    Balanced().feed(page)
    rows = [re.findall(r"<td[^>]*>(.*?)</td>", row) for row in re.findall(r"<tr>(.*?)</tr>", page, re.DOTALL)]
    rows = [[html.unescape(re.sub(r"<[^>]+>", "", cell)).strip() for cell in row] for row in rows if row]
    assert rows[0] == ["same as the reference", "1 of 2", "2 of 2", "1 of 2", "1 of 2", "1 of 2"]
    assert rows[1] == ["plum?", "differs none", "differs green", "differs <pink>", "blue"]
    assert rows[2] == ["<free>", "anything", "anything", "anything", ""]
    assert rows[3][0] == "fig?" and rows[3][1] == "same red"


def test_damaged_files(tmp_path):
    SamplesFile(tmp_path).on_samples(0, samples("a"))
    path = tmp_path / "samples.jsonl"
    whole = path.read_text()
    path.write_text(whole + '{"iteration": 1, "mess')  # the run is writing
    assert len(read_answers(path)) == 3
    path.write_text("[]\n" + whole)
    with pytest.raises(DataError, match="line 1: not a line of samples"):
        read_answers(path)
    assert read_answers(tmp_path / "none.jsonl") == []


def test_the_table_for_wandb_grows():
    """wandb keeps the last table of a run, so each has all answers so far."""
    hook, logged = object.__new__(WeightsAndBiases), []
    hook.rows, hook.table = [], lambda columns, data: (columns, list(data))
    hook.run = SimpleNamespace(log=lambda values, step: logged.append((step, values["samples"])))
    hook.on_samples(0, samples("none"))
    hook.on_samples(5, samples("blue"))
    assert [step for step, _ in logged] == [0, 5]
    columns, rows = logged[1][1]
    assert columns == ["iteration", *COLUMNS] and len(rows) == 6
    assert rows[2] == [0, "user: plum?", "none", "blue", False] and rows[5] == [5, "user: plum?", "blue", "blue", True]


def test_a_resumed_run_keeps_the_first_answers(tmp_path):
    """wandb's table begins with the rows of earlier starts."""
    SamplesFile(tmp_path).on_samples(0, samples("none"))
    with (tmp_path / "samples.jsonl").open("a") as file:
        file.write("{damaged\n")
    assert [(at, one.cells()) for at, one in earlier(tmp_path)] == [(0, one.cells()) for one in samples("none")]
    assert list(earlier(tmp_path / "none")) == list(earlier(None)) == []


def test_answers_of_chats_are_not_judged():
    one = Sample(asked("fig?"), "a red one", "red", judged=False)
    assert one.right is None and one.entry() == {"messages": asked("fig?"), "answer": "a red one", "reference": "red"}
    assert summary([one]) == "1 prompt"


def test_the_line_on_the_screen():
    assert summary(samples("blue")) == "3 prompts, 2 of 2 right" and summary(samples("x")[1:2]) == "1 prompt"
    assert json.loads(json.dumps(samples("x")[1].entry())) == {"messages": asked("<free>"), "answer": "anything"}
