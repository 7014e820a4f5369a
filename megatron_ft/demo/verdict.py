"""The requirements of the demo, one row each: before, after, required, and the likely cause if it is not met."""

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from megatron_ft.steps.screen import clock

HELD_OUT_NEEDED = 0.90
HELD_OUT_BEFORE = 0.05  # a higher share before training means that the questions can be answered without it
LOGITS_TOLERANCE = 1e-4
SECONDS = 360


@dataclass(frozen=True)
class Row:
    """One line of the result table. how: source of the numbers. cause: likely cause if it is not met."""

    name: str
    before: str
    after: str
    needed: str
    passed: bool
    how: str
    cause: str = ""


def judge(summary: dict[str, Any]) -> list[Row]:
    """Return all rows. summary: the content of summary.json."""
    return [rule(summary) for rule in _RULES]


def _held_out(s: dict[str, Any]) -> Row:
    before, after, loss = s["heldout_exact_match_before"], s["heldout_exact_match_after"], s["loss_last"]
    cause = ""
    if before > HELD_OUT_BEFORE:
        cause = "the model gave right answers before training: an answer is in the base model or in the question"
    elif after < HELD_OUT_NEEDED and not loss < 0.1:
        cause = f"training was not long enough, its loss is still {loss:.3g}: see its curve in the report"
    elif after < HELD_OUT_NEEDED:
        cause = (
            "the model learned the training chats, but not the facts in other wordings: see the answers in the report"
        )
    return Row(
        "held-out exact match", f"{before:.1%}", f"{after:.1%}", f">= {HELD_OUT_NEEDED:.0%}", not cause,
        f"{s['heldout_questions']} questions, exact text of the answer; generate on {s['world_size']} processes", cause,
    )  # fmt: skip


def _loss(s: dict[str, Any]) -> Row:
    first, last = s["loss_first"], s["loss_last"]
    cause = ""
    if s["loss_not_finite"] or not math.isfinite(last):
        cause = "the loss was not a number at some step: the learning rate is too high, or a weight is damaged"
    elif not last < first:
        cause = "the loss did not fall: the learning rate is too low, or no token of the chats is trained on"
    return Row(
        "training loss", f"{first:.2f}", f"{last:.4f}", "lower", not cause,
        "first step; mean of the last ten", cause,
    )  # fmt: skip


def _weights(s: dict[str, Any]) -> Row:
    same = s["weights_round_trip_identical"]
    return Row(
        "weights HF -> 4 shards -> HF", "", "same" if same else "differ", "bit-exact", same,
        f"{s['weights_compared']} tensors of the untrained model, byte by byte",
        "" if same else f"a converter changed {s['weights_first_difference']}: this is a bug, please report it",
    )  # fmt: skip


def _logits(s: dict[str, Any]) -> Row:
    difference = s["hf_logits_max_abs_diff"]
    passed = difference <= LOGITS_TOLERANCE  # False for not-a-number
    return Row(
        "logits, ours vs transformers", "", f"{difference:.1e}" if difference else "equal", f"<= {LOGITS_TOLERANCE:.0e}", passed,
        f"largest difference at {s['hf_logits_positions']} positions; the largest logit is {s['hf_logits_largest']:.0f}",
        "" if passed else "the export and the checkpoint compute different logits: this is a bug, please report it",
    )  # fmt: skip


def _answers(s: dict[str, Any]) -> Row:
    same, total = s["hf_same_answers"], s["hf_prompts"]
    cause = (
        ""
        if same == total
        else "tokenizer, chat template or stop token of the export differ: this is a bug, please report it"
    )
    return Row(
        "answers, ours vs transformers", "", f"{same} of {total}", "all same", same == total,
        "greedy, from the export's chat template and generation_config.json", cause,
    )  # fmt: skip


def _time(s: dict[str, Any]) -> Row:
    passed = s["wall_seconds"] <= SECONDS
    cause = f"this machine is slow or busy ({s['cpu_cores']} cores); the model is not affected"
    return Row(
        "wall time", "", clock(s["wall_seconds"]), f"<= {clock(SECONDS)}", passed,
        f"on {s['cpu_cores']} CPU cores", "" if passed else cause,
    )  # fmt: skip


_RULES: tuple[Callable[[dict[str, Any]], Row], ...] = (_held_out, _loss, _weights, _logits, _answers, _time)
