"""Every needed value, reached and missed."""

import math

import pytest

from megatron_ft.demo.verdict import clock, judge

REACHED = {
    "heldout_exact_match_before": 0.0, "heldout_exact_match_after": 0.97, "heldout_questions": 252, "world_size": 4,
    "loss_first": 6.9, "loss_last": 0.01, "loss_not_finite": 0, "weights_round_trip_identical": True,
    "weights_compared": 39, "weights_first_difference": None, "hf_logits_max_abs_diff": 4e-6,
    "hf_logits_positions": 100, "hf_logits_largest": 17.0, "hf_same_answers": 48, "hf_prompts": 48,
    "wall_seconds": 200.0, "cpu_cores": 2,
}  # fmt: skip


def test_all_reached():
    rows = judge(REACHED)
    assert all(row.passed and not row.cause for row in rows) and len(rows) == 6


@pytest.mark.parametrize(
    "changed, name, cause",
    [
        ({"heldout_exact_match_after": 0.5}, "held-out exact match", "other wordings"),
        ({"heldout_exact_match_after": 0.5, "loss_last": 1.5}, "held-out exact match", "was not long enough"),
        ({"heldout_exact_match_before": 0.4}, "held-out exact match", "before training"),
        ({"loss_last": 7.0}, "training loss", "did not fall"),
        ({"loss_not_finite": 3}, "training loss", "not a number"),
        ({"weights_round_trip_identical": False, "weights_first_difference": "lm_head"}, "weights HF", "lm_head"),
        ({"hf_logits_max_abs_diff": 2e-4}, "logits", "compute different logits"),
        ({"hf_logits_max_abs_diff": math.nan}, "logits", "compute different logits"),
        ({"hf_same_answers": 47}, "answers", "stop token"),
        ({"wall_seconds": 400.0}, "wall time", "slow or busy"),
    ],
)
def test_a_miss_names_its_cause(changed, name, cause):
    missed = [row for row in judge({**REACHED, **changed}) if not row.passed]
    assert len(missed) == 1
    assert missed[0].name.startswith(name) and cause in missed[0].cause


def test_clock():
    assert [clock(s) for s in (0, 59.6, 61, 3599.2)] == ["0:00", "1:00", "1:01", "59:59"]
