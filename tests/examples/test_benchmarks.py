"""examples/benchmarks: its lists and commands are read; with lm_eval, the lists' tasks run on made-up data in their real formats."""

import contextlib
import importlib.util
import json
import os
import subprocess
from pathlib import Path

import pytest

from megatron_ft.commands.evaluate_harness import COMMAND, HarnessModel, HarnessTasks, check, names_of
from megatron_ft.config.cli import parse
from megatron_ft.config.sections import Processes
from tests.examples.test_commands import FAKE, ROOT

FOLDER = ROOT / "examples/benchmarks"
LISTS = sorted(FOLDER.glob("*.txt"))
PUBLISHED = {"arc_challenge": 25, "hellaswag": 10, "mmlu": 5, "truthfulqa_mc2": 0, "winogrande": 5, "gsm8k": 5}
"""Examples before each question in the leaderboard whose six benchmarks ReluFalcon reports."""
needs_lm_eval = pytest.mark.skipif(importlib.util.find_spec("lm_eval") is None, reason="lm_eval is not installed")


def rows_of(path: Path) -> list[tuple[str, int]]:
    """Return task and number of examples of each line."""
    lines = [line.split() for line in path.read_text().splitlines() if line and not line.startswith("#")]
    return [(task, int(shots)) for task, shots in lines]


def test_lists_ask_as_published():
    assert dict(rows_of(FOLDER / "six.txt")) == PUBLISHED
    for path in LISTS:
        assert rows_of(path) and set(rows_of(path)) <= set(PUBLISHED.items())


@pytest.mark.parametrize("path", LISTS, ids=lambda path: path.name)
def test_commands_are_understood(path, tmp_path, monkeypatch):
    """run.sh starts one command for each line of a list."""
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: True)
    fake, record = tmp_path / "python", tmp_path / "record"
    fake.write_text(FAKE)
    fake.chmod(0o755)
    words = [str(path), "a model", str(tmp_path / "out"), "--max_length", "8192", "--nproc_per_node", "8"]
    environment = os.environ | {"PYTHON": str(fake), "RECORD": str(record)}
    subprocess.run([str(FOLDER / "run.sh"), *words], env=environment, check=True, timeout=60)
    commands = [line.split("\x1f")[:-1] for line in record.read_text().splitlines()]
    assert len(commands) == len(rows_of(path))
    for words, (task, shots) in zip(commands, rows_of(path), strict=True):
        assert words[:4] == ["-m", "megatron_ft", "evaluate", "harness"]
        model, tasks, _, processes = parse(COMMAND, words[4:])
        check(model, tasks)
        assert (names_of(tasks), tasks.num_fewshot, model.load, model.max_length) == ([task], shots, "a model", 8192)
        assert tasks.output == str(tmp_path / "out" / task) and processes.nproc_per_node == 8


MMLU = {"question": "Which plum ?", "choices": ["a", "b", "c", "d"], "answer": 2, "subject": "plums"}
DATA = {
    "allenai/ai2_arc": {
        "id": "1", "question": "Which plum ?", "choices": {"text": ["ab", "bc", "cd"], "label": ["A", "B", "C"]}, "answerKey": "B",
    },
    "Rowan/hellaswag": {
        "activity_label": "plums", "ctx_a": "a plum is", "ctx_b": "it", "endings": ["ab", "bc", "cd", "de"], "label": "3",
    },
    "cais/mmlu": MMLU,
    "truthfulqa/truthful_qa": {
        "question": "Which plum ?", "mc1_targets": {"choices": ["ab", "bc"], "labels": [1, 0]},
        "mc2_targets": {"choices": ["ab", "bc", "cd"], "labels": [1, 1, 0]},
    },
    "allenai/winogrande": {"sentence": "a plum and _ are ripe", "option1": "ab", "option2": "bc", "answer": "2"},
    "openai/gsm8k": {"question": "How many plums ?", "answer": "ab bc #### 12"},
}  # fmt: skip
"""Name of a data set on the hub -> a record with its columns. datasets reads a folder of that name in place of the hub."""
CONFIGS = ("ARC-Challenge", "anatomy", "multiple_choice", "winogrande_xl", "main", "default")


def make_data(folder: Path) -> None:
    for name, record in DATA.items():
        here = folder / name
        here.mkdir(parents=True)
        rows = [json.dumps(record).replace("plum", f"plum {number}") for number in range(30)]
        (here / "rows.jsonl").write_text("\n".join(rows))
        splits = [{"split": split, "path": "rows.jsonl"} for split in ("train", "validation", "test", "dev")]
        configs = [{"config_name": config, "data_files": splits} for config in CONFIGS]
        (here / "README.md").write_text(f"---\n{json.dumps({'configs': configs})}\n---\n")


def run_list(folder: Path, rows: list[tuple[str, int]]) -> list[dict]:
    """Run a list as run.sh does, in this rank; return the results of each task."""
    from megatron_ft.commands.evaluate_harness import run
    from megatron_ft.commands.in_layout import GenerationLayout
    from megatron_ft.evaluation.harness import run as harness

    found, index = [], harness.task_manager([], True, [])  # of 14,000 tasks, made once
    with pytest.MonkeyPatch.context() as patch, contextlib.chdir(folder):
        patch.setenv("HF_HOME", str(folder / "cache"))
        patch.setattr(harness, "task_manager", lambda *_: index)
        for task, shots in rows:
            tasks = HarnessTasks([task], lm_eval_tasks=True, num_fewshot=shots, limit=2, output=str(folder / "out"))
            assert run(HarnessModel(str(folder / "model")), tasks, GenerationLayout(), Processes()) == 0
            found.append(json.loads((folder / "out/harness.json").read_text())["results"][task])
    return found


@needs_lm_eval
def test_the_six_run(tmp_path, one_rank, monkeypatch):
    """Of mmlu's 57 parts one. Each of the six has a score, with its number of examples."""
    from tests.conversion.builders import make_llama, make_sentencepiece

    make_data(tmp_path)
    make_llama(tmp_path / "model", max_position_embeddings=512)
    make_sentencepiece(tmp_path / "model")
    rows = [("mmlu_anatomy" if task == "mmlu" else task, shots) for task, shots in rows_of(FOLDER / "six.txt")]
    ((*scores,),) = one_rank.run(run_list, tmp_path, rows)
    for (task, _), values in zip(rows, scores, strict=True):
        metric = "exact_match,strict-match" if task == "gsm8k" else "acc,none"
        assert 0 <= values[metric] <= 1 and values["sample_len"] == 2
