"""examples/relu_falcon_40b: its text, small.sh with a very small model and few steps, and the sizes of the job."""

import importlib.util
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from megatron_ft.commands.finetune import COMMAND
from megatron_ft.config.cli import parse
from tests.errors.conftest import interpreter_of_the_desk
from tests.examples.test_commands import started

ROOT = Path(__file__).resolve().parents[2]
EXAMPLE = ROOT / "examples" / "relu_falcon_40b"


def module(name):
    spec = importlib.util.spec_from_file_location(name, EXAMPLE / f"{name}.py")
    found = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(found)
    return found


TEXTS = [ROOT / "docs" / f"{name}.md" for name in ("architecture", "distillation", "sparse_decoding")]


def small(out, **environment):
    """Run small.sh with a very small model and few steps; return results.json."""
    values = {
        "STEPS": "6", "RECOVERY": "2", "SEEDS": "1", "LAYERS": "2", "VOCAB": "300",
        "MAX_NEW_TOKENS": "2", "PYTHONPATH": str(ROOT),
    }  # fmt: skip
    with interpreter_of_the_desk() as python:
        done = subprocess.run(
            [str(EXAMPLE / "small.sh"), str(out), *map(str, TEXTS)], capture_output=True, text=True, timeout=600,
            env={**os.environ, **values, **environment, "PYTHON": str(python)},
        )  # fmt: skip
    assert done.returncode == 0, done.stdout + done.stderr
    return json.loads((out / "results.json").read_text())


def test_small_measures_sparse_decoding(tmp_path):
    """Of every model with ReLU, before the recovery and after, in every mode; GELU has none."""
    gelu, *others = small(tmp_path / "out", OBJECTIVES="kd")["models"]
    assert [one["name"] for one in (gelu, *others)] == ["gelu", "swapped", "kd-1"]
    for mode in ("dense", "exact", "predicted"):
        key = f"{mode}_decoding_tokens_per_second"
        assert gelu[key] is None and all(one[key] > 0 for one in others)
    answers = {
        mode: [
            json.loads(line) for line in (tmp_path / "out" / "speed" / f"kd-1-{mode}.jsonl").read_text().splitlines()
        ]
        for mode in ("dense", "exact")
    }
    assert answers["dense"] == answers["exact"] and len(answers["exact"]) == 4
    page = (tmp_path / "out" / "results.html").read_text()
    assert all(f"kernel, {mode}" in page for mode in ("dense", "exact", "predicted"))
    fitted = json.loads((tmp_path / "out" / "predictors" / "kd-1" / "predictors.json").read_text())
    assert len(fitted["layers"]) == 2 and fitted["rank"] == 32


@pytest.mark.slow
@pytest.mark.thorough
def test_small(tmp_path):
    result = small(tmp_path / "out", SPARSE="")
    gelu, swapped, trained, taught = result["models"]
    assert [one["name"] for one in result["models"]] == ["gelu", "swapped", "lm-1", "kd-1"]
    assert trained["loss"] != taught["loss"] and "of 1 seeds" in result["verdict"]
    assert gelu["zeros"] < 0.01 and swapped["zeros"] > 0.2 and len(trained["layers"]) == 2
    assert all(one["decoding_tokens_per_second"] > 0 for one in result["models"])
    assert all(one["exact_decoding_tokens_per_second"] is None for one in result["models"])
    assert swapped["training_tokens_per_second"] is None and trained["training_tokens_per_second"] > 0
    page = (tmp_path / "out" / "results.html").read_text()
    assert "swapped for ReLU, not trained" in page and page.count("<svg") == 2
    config = json.loads((tmp_path / "out" / "lm-1" / "iter_0000002" / "config.json").read_text())
    assert config["architecture"]["hf"]["activation_swap"] == {"from": "gelu", "to": "relu"}


def test_text_is_the_same_each_time(tmp_path):
    make_text = module("make_text")
    files = [tmp_path / name for name in ("b.txt", "a.txt", "short.txt")]
    for file, letter in zip(files, "bas", strict=True):
        file.write_text(letter * (10 if letter == "s" else 300))
    assert make_text.write(tmp_path / "out.jsonl", make_text.texts(files), 400) == (2, 400)
    texts = [json.loads(line)["text"] for line in (tmp_path / "out.jsonl").read_text().splitlines()]
    assert sorted(text[0] for text in texts) == ["a", "b"] and sorted(map(len, texts)) == [100, 300]
    assert list(make_text.texts(files)) == list(make_text.texts(files[::-1]))


def test_docstrings_are_text():
    make_text = module("make_text")
    code = '"""Module."""\ndef f():\n    """First.\n\n    Second."""\nclass C:\n    x = 1\n    def g(self):\n        "Third."\n'
    assert make_text.docstrings(code).split("\n\n") == ["Module.", "First.", "Second.", "Third."]
    assert make_text.docstrings("def f(:") == ""
    assert any(path.name == "architecture.md" for path in make_text.documents())


def entry(name, loss):
    return {"name": name, "loss": loss}


def test_the_verdict_counts_seeds():
    results = module("results")
    entries = [entry("gelu", 3.0), entry("swapped", 5.0)]
    assert "nothing to compare" in results.verdict([*entries, entry("lm-1", 4.0)])
    seeds = [entry("lm-1", 4.0), entry("kd-1", 3.5), entry("lm-2", 4.0), entry("kd-2", 4.5)]
    assert "4.0000 with LM alone, 4.0000 with LM + KL; LM + KL is lower for 1 of 2 seeds" in results.verdict(
        [*entries, *seeds]
    )


def test_a_folder_without_results(tmp_path):
    command = [sys.executable, str(EXAMPLE / "results.py"), str(tmp_path)]
    done = subprocess.run(command, env={**os.environ, "PYTHONPATH": str(ROOT)}, capture_output=True, text=True)
    assert done.returncode == 2 and done.stderr.startswith("results.py: ") and "Traceback" not in done.stderr


def test_the_job_s_sizes(tmp_path):
    """40 processes, batch 1920, a cosine from 3e-5, about 5 G tokens; the teacher is the model before the swap."""
    ((_, *words),) = started("relu_falcon_40b/train.sbatch", tmp_path)
    settings = parse(COMMAND, words)[0]
    parallel, batch = settings.parallel, settings.batch
    assert parallel.tensor_model_parallel_size * parallel.pipeline_model_parallel_size == 40
    assert batch.global_batch_size == 1920 and settings.optimizer.lr_decay_style == "cosine"
    assert settings.optimizer.lr == 3e-5
    assert 4.9e9 < batch.train_iters * batch.global_batch_size * settings.data.seq_length < 5.1e9
    prepared = (EXAMPLE / "prepare.sh").read_text().split()
    for folder in (settings.distillation.teacher, settings.checkpointing.load):
        assert folder in prepared
    assert settings.data.data_path == ["data/relu_falcon/refinedweb-train"]
    header = (EXAMPLE / "train.sbatch").read_text()
    assert "#SBATCH --nodes=5\n" in header and "#SBATCH --gpus-per-node=8\n" in header
