"""compare: what it says of runs whose numbers are known, and what it refuses."""

import json
import re

import pytest

from megatron_ft.commands.compare import COMMAND, run
from megatron_ft.config.cli import run_script
from megatron_ft.report.compare_page import norm_rows, result_rows, smoothed
from megatron_ft.report.runs import common_end, differing_settings, read_runs, same_samples
from tests.demo.test_report import Balanced


def write(folder, losses, tokens=100, norm=2.0, used="a", **settings):
    folder.mkdir(parents=True)
    steps = [
        {"iteration": i, "train/loss": loss, "train/tokens": tokens, "train/grad_norm": norm / i, "train/samples_hash": f"{used}{i}"}
        for i, loss in enumerate(losses, 1)
    ]  # fmt: skip
    steps.append({"iteration": len(losses), "eval/loss": 7.0})
    (folder / "metrics.jsonl").write_text("".join(json.dumps(step) + "\n" for step in steps))
    (folder / "training.yaml").write_text("".join(f"{k}: {v}\n" for k, v in {"save": folder, **settings}.items()))
    return folder


@pytest.fixture
def folders(tmp_path):
    """Forty steps of 100 tokens, and twenty of 400."""
    long = write(tmp_path / "long", [40.0 - i for i in range(40)], lr=1e-5, seed=1)
    short = write(tmp_path / "short", [30.0 - i for i in range(20)], 400, 6.0, lr=2e-5, seed=1)
    return [long, short]


def test_losses_are_compared_where_all_runs_have_been(folders):
    runs = read_runs(folders)
    assert common_end(runs, "step") == 20 and common_end(runs, "tokens") == 4000
    by_step = {row[0]: row for row in result_rows(runs, "step")}
    by_tokens = {row[0]: row for row in result_rows(runs, "tokens")}
    assert by_step["long"] == ("long", "40", "4k", "40.0000", "25.5000", "5.5000", "7.0000", "7.0000")
    assert by_step["short"][4] == "15.5000"  # steps 11 to 20
    assert by_tokens["long"][4] == "5.5000" and by_tokens["short"][4] == "25.5000"  # its steps 1 to 10: 4000 tokens
    assert [row[0] for row in result_rows(runs, "step")] == ["short", "long"]  # the lowest first
    assert [row[0] for row in result_rows(runs, "tokens")] == ["long", "short"]


def test_gradient_norms_settings_and_samples(folders, tmp_path):
    runs = read_runs(folders)
    assert norm_rows(runs, 2) == [("long", "2", "2", "1.5", "1"), ("short", "6", "6", "4.5", "3")]
    assert differing_settings(runs) == [("lr", ["1e-05", "2e-05"])]
    assert same_samples(runs) is True
    other = write(tmp_path / "other", [1.0] * 20, used="b")
    assert same_samples(read_runs([folders[0], other])) is False


def test_means_of_the_last_steps():
    assert smoothed([(1, 1.0), (2, 3.0), (3, 8.0)], 2) == [(1, 1.0), (2, 2.0), (3, 5.5)]


def test_the_page_has_a_line_for_each_run_in_its_own_style(folders, tmp_path, capsys):
    assert run_script(COMMAND, run, [*map(str, folders), "--output", str(tmp_path / "c.html"), "--by", "tokens"]) == 0
    assert "loss at 4k tokens" in capsys.readouterr().out
    html = (tmp_path / "c.html").read_text()
    Balanced().feed(html)
    losses = html.split("training loss</b>")[1].split("</figure>")[0]
    drawn = {name: path.split("L") for name, path in re.findall(r'<path class="line (n\d)" d="M([^"]+)"', losses)}
    assert {name: len(points) for name, points in drawn.items()} == {"n1": 40, "n2": 20}
    end = {name: float(points[-1].split()[0]) for name, points in drawn.items()}
    assert end["n1"] < end["n2"]  # 4000 tokens lie left of 8000
    assert "tokens read" in losses and "nats per trained token" in losses
    assert not re.search(r"https?://|src=|@import|url\(", html)


def test_names(folders, tmp_path):
    same = write(tmp_path / "again" / "long", [1.0])
    assert [r.name for r in read_runs([folders[0], same])] == [f"{tmp_path.name}/long", "again/long"]
    assert [r.name for r in read_runs(folders, ["A", "B"])] == ["A", "B"]


@pytest.mark.parametrize(
    ("more", "said"),
    [
        ([], "two or more folders"),
        (["{tmp}/empty"], "no metrics.jsonl with training losses"),
        (["{tmp}/short", "--names", "A"], "1 name for 2 runs"),
        (["{tmp}/short", "--names", "A", "A"], "two runs have the name A"),
        (["{tmp}/short", "--smoothing", "0"], "at least 1"),
        (["{tmp}/none", "--by", "tokens"], "no train/tokens"),
    ],
)
def test_mistakes_are_one_line(folders, tmp_path, capsys, more, said):
    (tmp_path / "empty").mkdir()
    (tmp_path / "none").mkdir()
    (tmp_path / "none/metrics.jsonl").write_text('{"iteration": 1, "train/loss": 1.0}\n')
    words = [str(folders[0]), *(word.format(tmp=tmp_path) for word in more), "--output", str(tmp_path / "c.html")]
    assert run_script(COMMAND, run, words) == 2
    error = capsys.readouterr().err
    assert said in error and error.count("\n") == 1 and not (tmp_path / "c.html").exists()
