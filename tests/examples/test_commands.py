"""Every command that the scripts of examples start, as its command line reads it; none of it runs."""

import importlib
import os
import subprocess
from pathlib import Path

import pytest

from megatron_ft.commands.table import ENTRIES, find
from megatron_ft.config.cli import parse

ROOT = Path(__file__).resolve().parents[2]
FAKE = """#!/usr/bin/env bash
# Stands for python: records its words, and prints a number of steps.
{ printf '%s\\x1f' "$@"; echo; } >> "$RECORD"
echo 7
"""
SCRIPTS = {
    "adapters_small/run.sh": ["pretokenize"] * 2 + ["hf-to-megatron", "finetune", "finetune", "generate", "megatron-to-hf"]
    + ["merge-adapter", "verify", "hf-to-megatron", "megatron-to-hf"],
    "airophin_13b/prepare.sh": ["pretokenize", "pretokenize", "hf-to-megatron"],
    "airophin_13b/single_gpu.sh": ["finetune", "finetune"],
    "airophin_13b/merge.sh": ["megatron-to-hf", "merge-adapter", "verify"],
    "airophin_13b/gptq.sh": ["hf-to-megatron", "megatron-to-hf"],
    "airophin_13b/phase1.sbatch": ["finetune"],
    "airophin_13b/phase2.sbatch": ["finetune"],
    "alfred_40b/prepare.sh": ["pretokenize", "hf-to-megatron"],
    "relu_falcon_40b/prepare.sh": ["pretokenize", "hf-to-megatron", "hf-to-megatron"],
    "retrieval_small/run.sh": ["pretokenize"] * 2 + ["hf-to-megatron", "finetune", "finetune", "megatron-to-hf"]
    + ["hf-to-megatron"] * 3 + ["evaluate retrieval"],
    "oasst_llama2_70b/prepare.sh": ["pretokenize", "pretokenize", "hf-to-megatron"],
}  # fmt: skip
"""Script -> the commands that it starts, in order."""


def started(script: str, tmp_path: Path) -> list[list[str]]:
    """Return the words of each start of megatron_ft by a script."""
    fake, record, out = tmp_path / "python", tmp_path / "record", tmp_path / "out"
    fake.write_text(FAKE)
    fake.chmod(0o755)
    out.mkdir()
    (out / "answers.jsonl").write_text("{}\n")
    folders = {"SAVE": str(tmp_path / "save"), "LOGS": str(tmp_path / "logs")}
    environment = os.environ | folders | {"PYTHON": str(fake), "RECORD": str(record), "STAND_IN_NODES": "1"}
    submit = [str(ROOT / "examples/slurm/stand_in/sbatch")] if script.endswith(".sbatch") else []
    more = [str(out)] if script.endswith("run.sh") else []
    done = subprocess.run([*submit, str(ROOT / "examples" / script), *more], cwd=ROOT, env=environment, timeout=60)
    assert done.returncode == 0
    lines = [line.split("\x1f")[:-1] for line in record.read_text().splitlines()]
    return [words[2:] for words in lines if words[:2] == ["-m", "megatron_ft"]]


@pytest.mark.parametrize("script", SCRIPTS)
def test_commands_are_understood(script, tmp_path):
    commands = [find(words) for words in started(script, tmp_path)]
    assert [name for name, _ in commands] == SCRIPTS[script]
    for name, words in commands:
        assert name
        parse(importlib.import_module(ENTRIES[name].module).COMMAND, words)


def test_airophin_s_phases_follow_each_other(tmp_path):
    """The second begins from what the first saves, with settings that go with adapters on NF4."""
    first, second = (
        parse(importlib.import_module(ENTRIES[name].module).COMMAND, words)[0]
        for name, *words in started("airophin_13b/single_gpu.sh", tmp_path)
    )
    assert second.checkpointing.load == first.checkpointing.save and second.checkpointing.finetune
    assert (first.adapters.lora_rank, second.adapters.lora_rank) == (64, None)  # the second's is in its checkpoint
    assert first.adapters.base_precision == second.adapters.base_precision == "nf4"
    assert second.batch.train_iters == 7


@pytest.mark.parametrize("script", ["airophin_13b/gptq.sh", "adapters_small/run.sh"])
def test_airophin_s_gptq_is_as_published(script, tmp_path):
    """It reads what the step before writes, and the shards of the second phase."""
    read, write = (
        parse(importlib.import_module(ENTRIES[name].module).COMMAND, words)[0]
        for name, *words in started(script, tmp_path)[-2:]
    )
    assert (write.quantize, write.bits, write.group_size, write.desc_act) == ("gptq", 4, 32, True)
    assert write.input_dir == read.output_dir and write.calibration.endswith("/chats-train")
