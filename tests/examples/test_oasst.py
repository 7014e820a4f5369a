"""examples/oasst on the real export and the real Llama-2 tokenizer, where they lie beside the repository: a few steps of run.sh."""

import importlib
import json
import os
import re
import shlex
import subprocess
from collections import Counter
from pathlib import Path

import pytest

from tests.errors.conftest import interpreter_of_the_desk

ROOT = Path(__file__).resolve().parents[2]
EXAMPLE = ROOT / "examples" / "oasst"
DATA = ROOT.parent / "shared" / "data"
EXPORT, TOKENIZER = DATA / "oasst" / "en_100_tree.jsonl", DATA / "tokenizers" / "llama2" / "tokenizer.model"
SMALL = {"ITERS": "8", "SEQ_LENGTH": "128", "HIDDEN": "64", "LR": "5e-3", "MAX_NEW_TOKENS": "8", "ASK_BEFORE": "0"}


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    """The folder that run.sh filled."""
    if not (EXPORT.is_file() and TOKENIZER.is_file()):
        pytest.skip("the Open-Assistant export and the Llama-2 tokenizer are not there")
    out = tmp_path_factory.mktemp("oasst") / "out"
    with interpreter_of_the_desk() as python:
        done = subprocess.run(
            [str(EXAMPLE / "run.sh"), str(EXPORT), str(TOKENIZER), str(out)],
            env={**os.environ, **SMALL, "PYTHON": str(python), "PYTHONPATH": str(ROOT)},
            capture_output=True, text=True, timeout=300,
        )  # fmt: skip
    assert done.returncode == 0, done.stdout + done.stderr
    (out / "printed.txt").write_text(done.stdout)
    return out


@pytest.mark.slow
def test_loss_falls(made):
    lines = map(json.loads, (made / "tuned" / "metrics.jsonl").read_text().splitlines())
    losses = [line["train/loss"] for line in lines if "train/loss" in line]
    assert len(losses) == 8
    assert 10.2 < losses[0] < 10.6  # ln 32002 = 10.37: a random model knows nothing
    assert losses[-1] < losses[0] - 0.5


@pytest.mark.slow
def test_export_gives_the_same_answers(made):
    """Said by compare_answers.py, which loads the export with transformers."""
    assert "loaded by transformers: 1 of 1 greedy answers are the same" in (made / "printed.txt").read_text()


@pytest.mark.slow
def test_chat_template_gives_the_ids_that_were_trained_on(made):
    """Every conversation of the validation shards, through the exported template."""
    from transformers import AutoTokenizer

    from megatron_ft.data.chat_format import get_format
    from megatron_ft.data.shards import open_shards
    from megatron_ft.data.tokenizer import load_tokenizer
    from tools.pretokenizer.oasst import OasstOptions, conversations

    exported = AutoTokenizer.from_pretrained(made / "hf")
    ours = load_tokenizer(TOKENIZER, ["<|im_start|>", "<|im_end|>"])
    trees = [json.loads(line) for line in EXPORT.read_text(encoding="utf-8").splitlines()]
    chats = [chat for tree in trees for chat in conversations(tree, "", OasstOptions(top_k=1), Counter())]
    shards = open_shards(f"{made}/shards/oasst-val")
    trained = {tuple(shards.tokens(i).tolist()) for i in range(len(shards))}
    found = set()
    for chat in chats:
        ids = exported.apply_chat_template(chat, return_dict=True)["input_ids"]
        assert ids == get_format("chatml").encode(ours, chat)[0].tolist()
        found |= {tuple(ids)} & trained
    assert found == trained and len(chats) > 90


def test_full_size_commands_are_understood():
    """Every megatron-ft command in the README, as its command line reads it; none of it runs."""
    from megatron_ft.commands.table import ENTRIES
    from megatron_ft.config.cli import parse

    commands = readme_commands()
    assert {name for name, _ in commands} >= {"pretokenize", "hf-to-megatron", "finetune", "megatron-to-hf"}
    for name, argv in commands:
        parse(importlib.import_module(ENTRIES[name].module).COMMAND, argv)


def readme_commands() -> list[tuple[str, list[str]]]:
    text = (EXAMPLE / "README.md").read_text(encoding="utf-8")
    blocks = re.findall(r"^```bash\n(.*?)^```", text, re.MULTILINE | re.DOTALL)
    lines = [line for block in blocks for line in block.replace("\\\n", " ").splitlines()]
    found = []
    for line in lines:
        words = shlex.split(line, comments=True)
        for start in ("megatron-ft", "megatron_ft"):
            if start in words:
                rest = words[words.index(start) + 1 :]
                found.append((rest[0], rest[1:]))
    return found
