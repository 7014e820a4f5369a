"""examples/adapters_small: a few steps of run.sh, its data, and what it leaves as transformers and PEFT read it."""

import json
import os
import re
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from megatron_ft.data.roles import PROMPTER
from megatron_ft.data.shards import open_shards
from tests.errors.conftest import interpreter_of_the_desk

ROOT = Path(__file__).resolve().parents[2]
EXAMPLE = ROOT / "examples" / "adapters_small"
SMALL = {"ITERS_LONG": "6", "EPOCHS": "0.2", "TP": "1", "MAX_NEW_TOKENS": "6"}


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    """The folder that run.sh filled."""
    with interpreter_of_the_desk() as python:
        return run(tmp_path_factory.mktemp("adapters") / "out", SMALL, str(python))


def run(out: Path, settings: dict[str, str], python: str = sys.executable) -> Path:
    environment = {**os.environ, **settings, "PYTHON": python, "PYTHONPATH": str(ROOT)}
    words = [str(EXAMPLE / "run.sh"), str(out)]
    done = subprocess.run(words, env=environment, capture_output=True, text=True, timeout=600)
    assert done.returncode == 0, done.stdout + done.stderr
    (out / "printed.txt").write_text(done.stdout)
    return out


def losses(run: Path) -> list[float]:
    lines = map(json.loads, (run / "metrics.jsonl").read_text().splitlines())
    return [line["train/loss"] for line in lines if "train/loss" in line]


@pytest.mark.slow
@pytest.mark.works("RoPE scaling", "NF4 base", "packing")
def test_both_phases_learn(made):
    first, second = losses(made / "phase1"), losses(made / "phase2")
    assert len(first) == 6 and len(second) == 5  # 84 rows x 0.2 epochs in batches of 4
    assert 6.4 < first[0] < 6.9  # ln 768 = 6.64: a random model knows nothing
    assert first[-1] < first[0] - 0.3 and second[0] < first[0] - 0.3


@pytest.mark.slow
def test_long_samples_have_their_lengths_and_chats_their_blocks(made):
    lengths = np.asarray(open_shards(made / "data" / "long-train").lengths)
    assert len(lengths) > 100 and lengths.min() >= 219 and lengths.max() <= 256
    assert "BEGINCONTEXT\ndate: " in asked(made) and "\nENDINPUT\nBEGININSTRUCTION\n" in asked(made)


def asked(made: Path) -> str:
    """Everything that users say in the chats."""
    from megatron_ft.data.tokenizer import load_tokenizer

    tokenizer, shards = load_tokenizer(made / "base"), open_shards(made / "data" / "chats-train")
    samples = ((shards.tokens(i), shards.role_bytes(i)) for i in range(len(shards)))
    return "\n".join(tokenizer.decode(ids[roles == PROMPTER].tolist()) for ids, roles in samples)


@pytest.mark.slow
@pytest.mark.works("RoPE scaling", "NF4 base", "Hugging Face export")
def test_merged_model_is_certified_and_answers_the_same(made):
    printed = (made / "printed.txt").read_text()
    assert "the base is unchanged, 21 tensors are bit-identical" in printed
    assert "loaded by transformers: 2 of 2 greedy answers are the same" in printed
    config = json.loads((made / "merged" / "config.json").read_text())
    assert config["max_position_embeddings"] == 512 and config["rope_scaling"]["factor"] == 4.0


@pytest.mark.slow
@pytest.mark.works("GPTQ, W4A16", "RoPE scaling", "NF4 base")
def test_merged_model_in_4_bits_loses_little(made):
    """The order of rounding is that of the inputs, and the card's perplexity hardly rises."""
    from safetensors.torch import load_file

    entry = json.loads((made / "gptq" / "config.json").read_text())["quantization_config"]
    assert (entry["bits"], entry["group_size"], entry["desc_act"]) == (4, 32, True)
    files = sorted((made / "gptq").glob("*.safetensors"))
    groups = [values for file in files for name, values in load_file(file).items() if name.endswith("g_idx")]
    assert len(groups) == 14 and any((group.diff() < 0).any() for group in groups)
    card = (made / "gptq" / "README.md").read_text()
    before, after = map(float, re.search(r"\| perplexity \| ([\d.]+) before, ([\d.]+) after", card).groups())
    assert after == pytest.approx(before, rel=0.02) and after != before
    assert "| chat format | vicuna |" in card


@pytest.mark.slow
@pytest.mark.works("PEFT export", "NF4 base")
def test_adapter_is_one_of_peft(made):
    """It has the settings of the training, and every matrix was trained."""
    import torch
    from safetensors.torch import load_file

    config = pytest.importorskip("peft", reason="peft is not installed").PeftConfig.from_pretrained(
        str(made / "adapter")
    )
    assert (config.r, config.lora_alpha, config.lora_dropout) == (32, 16, 0.05)
    tensors = load_file(made / "adapter" / "adapter_model.safetensors")
    assert len(tensors) == 2 * 2 * 7  # A and B of the seven matrices of two layers
    assert all(torch.isfinite(tensor).all() and tensor.any() for tensor in tensors.values())


@pytest.mark.slow
@pytest.mark.thorough
def test_the_full_length_learns(tmp_path):
    """As the README shows it: the first phase on two processes."""
    out = run(tmp_path / "out", {})
    assert losses(out / "phase1")[-1] < 3.5 and losses(out / "phase2")[-1] < 3.2
