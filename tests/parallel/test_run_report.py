"""The page that a run leaves, made from a real run over four ranks."""

import html
import json
import re
import shutil

import pytest

from megatron_ft.commands.report import write_at_end
from megatron_ft.errors import DataError
from megatron_ft.report.run_page import read_starts, spans, write_run_report
from tests.demo.test_report import Balanced
from tests.parallel.jobs import finetune, read_metrics


@pytest.fixture(scope="module")
def folder(four_ranks, checkpoint, shards, tmp_path_factory):
    """The folder of a run that was resumed once."""
    folder = tmp_path_factory.mktemp("run") / "tuned"
    common = {"data_path": [shards], "valid_data_path": [shards], "eval_iters": 1, "save": str(folder)}
    four_ranks.run(resumable, checkpoint, common | {"train_iters": 4, "eval_interval": 2})
    four_ranks.run(resumable, checkpoint, common | {"train_iters": 8, "eval_interval": 2, "auto_resume": True})
    return folder


def resumable(load, settings):
    finetune((2, 2), load=load, scalar_loss_mask=0.25, **settings)


def text_of(folder) -> str:
    return html.unescape(re.sub(r"<[^>]+>", " ", (folder / "report.html").read_text()))


def test_a_run_leaves_its_report(folder):
    page = (folder / "report.html").read_text()
    Balanced().feed(page)
    assert not re.search(r"https?://|src=|@import|url\(", page)
    text, losses = text_of(folder), read_metrics(folder)
    assert "tuned: 8 of 8 steps" in text
    assert f"{losses[0]:.4f} to {sum(losses[-10:]) / len(losses[-10:]):.4f}" in text
    assert "by role" in text and "by position" not in text  # all samples are short: one stretch says nothing
    assert "trained on, weight 0.25" in text  # the other roles' tokens


def test_layout_and_starts_are_those_of_the_run(folder, llama):
    from safetensors import safe_open

    starts = read_starts(folder)
    assert [start["iteration"] for start in starts] == [0, 4]
    ranks = starts[-1]["ranks"]
    assert [(r["tensor"], r["pipeline"], r["layers"]) for r in ranks] == [
        (0, 0, [0, 1]),
        (1, 0, [0, 1]),
        (0, 1, [2, 3]),
        (1, 1, [2, 3]),
    ]
    with safe_open(llama / "model.safetensors", "pt") as file:
        whole = sum(file.get_tensor(name).numel() for name in file.keys())  # noqa: SIM118 - not a dict
    # Norms are on both tensor parts, and the vocabulary of 203 is padded to 256.
    norms, padding = (2 * 4 + 1) * 64, 2 * (256 - 203) * 64
    assert sum(r["parameters"] for r in ranks) == whole + norms + padding
    assert "layers 2 to 3, output layer" in text_of(folder)


def test_a_page_of_what_is_there(folder, tmp_path):
    """Made again from half a folder, or of a run that only just started."""
    for name in ("metrics.jsonl", "run.json"):
        place = tmp_path / name
        place.mkdir()
        shutil.copy(folder / name, place)
        assert write_run_report(place) == place / "report.html"
    with pytest.raises(DataError, match=r"no metrics\.jsonl and no run\.json"):
        write_run_report(tmp_path)


def test_what_goes_wrong_shows(folder, tmp_path):
    shutil.copytree(folder, tmp_path / "bad", ignore=shutil.ignore_patterns("iter_*"))
    with (tmp_path / "bad/metrics.jsonl").open("a") as file:
        file.write(json.dumps({"iteration": 9, "train/loss": None, "train/skipped": 1}) + "\n")
        file.write(json.dumps({"iteration": 9, "eval/loss": 99.0}) + "\n")
    with (tmp_path / "bad/finetune.log").open("a") as file:
        file.write("2026-01-01 00:00:00,000 WARNING rank0 megatron_ft.training: mind the <gap>\n" * 2)
    write_run_report(tmp_path / "bad")
    text = text_of(tmp_path / "bad")
    assert re.search(r"not finite\s+1\s+0\s+check", text)
    assert re.search(r"lowest at step \d+: .*; it rises after that\s+check", text)
    assert re.search(r"mind the <gap>\s+2", text)


def test_a_report_that_fails_is_no_failure_of_the_run(tmp_path, caplog):
    (tmp_path / "metrics.jsonl").write_text("not json\nat all\n")
    write_at_end(tmp_path)
    assert "no report was written (DataError" in caplog.text


def test_spans():
    assert spans([3, 0, 1, 2, 8, 10, 11]) == "0 to 3, 8, 10 to 11" and spans([]) == ""
