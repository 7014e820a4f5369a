"""The whole demo, too small to learn: every step works, and the missed targets make it fail."""

import dataclasses
import json

import pytest

from megatron_ft.commands.demo import Demo, run
from megatron_ft.demo.base_model import Shape
from megatron_ft.demo.facts import COLOUR, SOUND


@pytest.mark.slow
def test_whole_demo(tmp_path, capfd):
    few = [dataclasses.replace(topic, facts=dict(list(topic.facts.items())[:6])) for topic in (COLOUR, SOUND)]
    code = run(
        Demo(str(tmp_path / "demo")), topics=few, chats=120, train_iters=4, seq_length=128,
        shape=Shape(vocab_size=400, hidden_size=32, intermediate_size=64, num_hidden_layers=2, num_attention_heads=4),
    )  # fmt: skip
    said = capfd.readouterr()
    summary = json.loads((tmp_path / "demo/summary.json").read_text())
    assert code == 1, said.out
    assert "held-out exact match: 0.0%, required >= 90%. Likely cause: training was not long enough" in said.out
    assert "4 shards" in said.out and said.err == ""
    assert summary["heldout_exact_match_before"] == summary["heldout_exact_match_after"] == 0
    assert summary["loss_last"] < summary["loss_first"] and not summary["passed"]
    assert summary["hf_logits_max_abs_diff"] <= 1e-4 and summary["weights_round_trip_identical"] is True
    assert summary["hf_same_answers"] == summary["hf_prompts"] == 24
    assert (
        summary["world_size"], summary["tensor_model_parallel_size"], summary["pipeline_model_parallel_size"],
    ) == (4, 2, 2)  # fmt: skip
    assert summary["wall_seconds"] > 0
    report = (tmp_path / "demo/report.html").read_text()
    assert "FAIL" in report and 'class="line a"' in report and "a requirement was not met" in report
