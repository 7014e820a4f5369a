"""Memory that pages take from `megatron-ft plan` is what it prints."""

import json
import re
import shlex
from pathlib import Path

import pytest

from megatron_ft.commands import plan
from megatron_ft.config.cli import parse
from tests.test_layers import ROOT, tracked

HEADER = re.compile(r"^\| `(?:megatron-ft )?plan \.\.\.(.*?)`")
ROW = re.compile(r"^\|.*?`(?:megatron-ft plan )?([\w.-]+ --gpus [^`]+)` \|.*?([\d.]+) of ([\d.]+) GB")


def rows(page: Path) -> list[tuple[str, str, str]]:
    """(command line, GB of the fullest GPU, GB that it has) of the rows of a page's tables. A header may have flags for all rows."""
    shared, found = "", []
    for line in page.read_text(encoding="utf-8").splitlines():
        if not line.startswith("|"):
            shared = ""
        elif header := HEADER.match(line):
            shared = header[1]
        elif row := ROW.match(line):
            found.append((row[1] + shared, row[2], row[3]))
    return found


ROWS = [row for page in tracked("*.md") for row in rows(page)]


def planned(words: str, capsys: pytest.CaptureFixture) -> dict:
    plan.run(*parse(plan.COMMAND, [*shlex.split(words), "--json"]))
    return json.loads(capsys.readouterr().out)


@pytest.mark.parametrize(("words", "needed", "there"), ROWS)
def test_the_fullest_gpu(words, needed, there, capsys):
    found = planned(words, capsys)
    largest = max(stage["total"] for stage in found["stages"])
    assert largest < found["gpu"]["memory_bytes"], "it does not fit any more"
    assert largest / 1e9 == pytest.approx(float(needed), rel=0.05, abs=1)
    assert found["gpu"]["memory_bytes"] / 1e9 == pytest.approx(float(there), abs=1)


def test_rows_are_found():
    assert len(ROWS) >= 18 and any("--lora_rank 64 --recompute_granularity full" in words for words, _, _ in ROWS)


def test_the_screen_in_the_readme(capsys, monkeypatch):
    monkeypatch.setenv("COLUMNS", "120")
    block = re.search(
        r"^    \$ megatron-ft plan (.*)\n((?:    .*\n)+)",
        (ROOT / "README.md").read_text(encoding="utf-8"),
        re.MULTILINE,
    )
    plan.run(*parse(plan.COMMAND, shlex.split(block[1])))
    screen = [line.split() for line in capsys.readouterr().out.splitlines()]
    for line in block[2].splitlines():
        assert line.split() == ["..."] or line.split() in screen, line


def test_what_to_expect_of_the_first_run(capsys):
    page = (ROOT / "docs" / "first_finetune.md").read_text(encoding="utf-8")
    flags = "--tensor_model_parallel_size 2 --sequence_parallel --use_distributed_optimizer --global_batch_size 64"
    assert page.count(" ".join(flags.split()[:-2])) == 3, "the plan and the runs have one layout"
    slow, fast = (planned(f"qwen2.5-7b --gpus 8 --gpu {gpu} {flags}", capsys) for gpu in ("a100-80gb", "h100-80gb"))
    told = [int(number) for number in re.search(r"about (\d+) s on H100, (\d+) s on A100", page).groups()]
    assert [sum(one["seconds_per_step"].values()) for one in (fast, slow)] == pytest.approx(told, rel=0.2)
    told = re.search(r"(\d+) GB, of which weights (\d+); memory of the host at a save (\d+) GB", page).groups()
    kept = fast["checkpoint"]
    found = [size / 1e9 for size in (kept["bytes"], kept["weights"], fast["host_memory_at_a_save"])]
    assert found == pytest.approx([int(number) for number in told], rel=0.05)
