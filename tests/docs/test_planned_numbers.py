"""Memory that pages take from `megatron-ft plan` is what it prints."""

import json
import re
import shlex

import pytest

from megatron_ft.commands import plan
from megatron_ft.config.cli import parse
from tests.test_layers import ROOT

ROW = re.compile(r"^\| `([\w.-]+ --gpus [^`]+)` \| (\d+) of (\d+) GB \|", re.MULTILINE)
PAGES = ("first_finetune.md", "choosing_layout.md")
ROWS = [row for page in PAGES for row in ROW.findall((ROOT / "docs" / page).read_text(encoding="utf-8"))]


def planned(words: str, capsys: pytest.CaptureFixture) -> dict:
    plan.run(*parse(plan.COMMAND, [*shlex.split(words), "--json"]))
    return json.loads(capsys.readouterr().out)


@pytest.mark.parametrize(("words", "needed", "there"), ROWS)
def test_the_fullest_gpu(words, needed, there, capsys):
    found = planned(words, capsys)
    largest = max(stage["total"] for stage in found["stages"])
    assert largest < found["gpu"]["memory_bytes"], "it does not fit any more"
    assert largest / 1e9 == pytest.approx(int(needed), rel=0.05, abs=1)
    assert found["gpu"]["memory_bytes"] / 1e9 == pytest.approx(int(there), abs=1)


def test_rows_are_found():
    assert len(ROWS) >= 12


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
