"""examples/falcon_40b_instruct: run.sh with a very small model, and the model as transformers reads it."""

import json
import os
import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
EXAMPLE = ROOT / "examples" / "falcon_40b_instruct"
SMALL = {"HIDDEN": "128", "LAYERS": "2", "MAX_NEW_TOKENS": "3"}


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    """The folder that run.sh filled."""
    out = tmp_path_factory.mktemp("falcon") / "out"
    packages = os.pathsep.join(filter(None, (str(ROOT), os.environ.get("PYTHONPATH"))))
    environment = {**os.environ, **SMALL, "PYTHON": sys.executable, "PYTHONPATH": packages}
    words = [str(EXAMPLE / "run.sh"), str(out)]
    done = subprocess.run(words, env=environment, capture_output=True, text=True, timeout=600)
    assert done.returncode == 0, done.stdout + done.stderr
    return out


def test_the_engine_is_measured_in_both_precisions(made):
    told = json.loads((made / "engine" / "measure.json").read_text())
    assert [(one["bits"], one["failed"], len(one["runs"])) for one in told["configurations"]] == [
        (16, None, 5),
        (4, None, 5),
    ]
    sixteen, four = (one["weight_bytes"] for one in told["configurations"])
    assert four < sixteen
    assert all(run["new_tokens"] == 3 for one in told["configurations"] for run in one["runs"])


def test_bitsandbytes_is_measured_where_it_is_installed(made):
    if find_spec("bitsandbytes") is None:
        assert not (made / "transformers").exists()
        return
    told = json.loads((made / "transformers" / "measure.json").read_text())
    assert [one["bits"] for one in told["configurations"] if not one["failed"]] == [16, 8, 4]


def test_the_model_is_a_falcon_40b_in_small(made):
    """transformers finds every tensor, and the tokenizer gives a text back."""
    from transformers import AutoModelForCausalLM, AutoTokenizer

    model, info = AutoModelForCausalLM.from_pretrained(made / "falcon", output_loading_info=True)
    assert not any(info[kind] for kind in ("missing_keys", "unexpected_keys", "mismatched_keys"))
    assert model.config.new_decoder_architecture and model.config.num_kv_heads == 1
    tokenizer = AutoTokenizer.from_pretrained(made / "falcon")
    text = "Grüße, Valencia! 1 + 1"
    assert tokenizer.decode(tokenizer(text)["input_ids"]) == text


def test_prompts_are_five():
    lines = [json.loads(line) for line in (EXAMPLE / "prompts.jsonl").read_text().splitlines()]
    assert len(lines) == 5 and all(line["prompt"] for line in lines)
