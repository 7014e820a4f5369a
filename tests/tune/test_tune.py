"""The whole of tune, with tiny models: six commands, answers, an interruption after which it goes on, a second start."""

import json
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from megatron_ft import device
from tests.tune import models

ROOT = Path(__file__).resolve().parents[2]


def start(*words, **more) -> subprocess.Popen:
    import os

    return subprocess.Popen(
        [sys.executable, "-m", "megatron_ft", "tune", *map(str, words)], cwd=ROOT, env={**os.environ, **device.CPU},
        stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, **more,
    )  # fmt: skip


def tuned(*words) -> str:
    process = start(*words)
    said, _ = process.communicate(timeout=600)
    assert process.returncode == 0, said
    return said


def trained_steps(out: Path) -> list[int]:
    lines = [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]
    return [line["iteration"] for line in lines if "train/loss" in line]


def answers_of_transformers(folder: Path, prompts: list[dict]) -> list[str]:
    """Greedy answers of the export, by transformers with the export's own chat template."""
    from transformers import AutoModelForCausalLM, AutoTokenizer

    tokenizer, model = AutoTokenizer.from_pretrained(folder), AutoModelForCausalLM.from_pretrained(folder)
    found = []
    for prompt in prompts:
        ids = tokenizer.apply_chat_template(
            prompt["messages"], add_generation_prompt=True, return_tensors="pt", return_dict=True
        )
        made = model.generate(**ids, max_new_tokens=64, do_sample=False)
        found.append(tokenizer.decode(made[0, ids["input_ids"].shape[1] :], skip_special_tokens=True).strip())
    return found


def check(said: str, out: Path, chats: int) -> None:
    """The folder of a finished run, and what was printed."""
    assert all(f"[{number}/6]" in said for number in range(1, 7)) and "on chats that were not trained on" in said
    prompts, before, after = (
        [json.loads(line) for line in path.read_text().splitlines()]
        for path in (out / "data/chats-val-prompts.jsonl", out / "before.jsonl", out / "after.jsonl")
    )
    assert len(prompts) == len(before) == len(after) == min(8, chats // 10)
    assert [line["answer"].strip() for line in after] == answers_of_transformers(out / "hf", prompts)
    report = (out / "report.html").read_text()
    assert prompts[0]["messages"][-1]["content"].split()[0] in report and prompts[0]["answer"].split()[0] in report
    steps = trained_steps(out)
    assert steps == list(range(1, len(steps) + 1)) and f"{len(steps)} steps of 1 row;" in said


@pytest.mark.slow
def test_a_llama_interrupted_in_training(tmp_path):
    """Ctrl-C while it trains: the same command goes on from there; other settings are refused; a third start has nothing to do."""
    chats = models.write_chats(tmp_path / "chats.jsonl", 20)
    words = (models.llama(tmp_path / "llama"), chats, "-o", tmp_path / "out", "--epochs", 25, "--global_batch_size", 1)
    process = start(*words)
    deadline = time.monotonic() + 300
    metrics = tmp_path / "out/metrics.jsonl"
    while time.monotonic() < deadline and process.poll() is None and not metrics.is_file():
        time.sleep(0.05)
    process.send_signal(signal.SIGINT)
    said, _ = process.communicate(timeout=120)
    assert process.returncode == 130 and "stopped; the same command goes on from here" in said, said
    first = trained_steps(tmp_path / "out")
    said = tuned(*words)
    assert "finished before" in said
    check(said, tmp_path / "out", 20)
    assert len(trained_steps(tmp_path / "out")) > len(first)
    other = start(*words, "--lr", "1e-4")
    assert "out was begun with lr not given, now it is 0.0001: give the same" in other.communicate(timeout=60)[0]
    assert other.returncode == 2
    assert tuned(*words).count("finished before") == 6


@pytest.mark.thorough
@pytest.mark.parametrize("make", [models.llama, models.qwen])
@pytest.mark.parametrize("words", [(), ("--lora",)])
def test_sixty_chats(tmp_path, make, words):
    chats = models.write_chats(tmp_path / "chats.jsonl", 60)
    said = tuned(make(tmp_path / "model"), chats, "-o", tmp_path / "out", *words)
    check(said, tmp_path / "out", 60)
