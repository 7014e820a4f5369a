"""What is done with keys about the length of a run and its schedule. Each function takes the job, the key and its value."""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Any

from megatron_ft.importing.job import Job, number, whole, written
from megatron_ft.importing.tables import OFF, Handler

STEPS_LATER = "megatron-ft preflight prints the number of steps once the chats are tokenized"


def epochs(job: Job, key: str, value: Any) -> None:
    if job.steps:
        job.ignore(key, value, "max_steps gives the length of the run")
        return
    job.epochs = number(key, value)
    job.take(key, value, f"--epochs {written(job.epochs)}")


def given_steps(values: Mapping[str, Any]) -> int | None:
    """Return the number of steps that a file gives; None where it gives epochs (max_steps is absent, 0 or below)."""
    steps = whole("max_steps", values.get("max_steps") or 0)
    return steps if steps > 0 else None


def max_steps(job: Job, key: str, value: Any) -> None:
    if (steps := whole(key, value)) > 0:
        job.steps = steps
        job.set(key, value, "train_iters", steps)
    else:
        job.ignore(key, value, OFF)


def warmup(job: Job, key: str, value: Any) -> None:
    share = number(key, value)
    if not share:
        job.ignore(key, value, OFF)
        return
    job.warmup = share
    job.take(key, value, "--lr_warmup_iters" if share >= 1 else "--lr_warmup_fraction")


def scheduler(job: Job, key: str, value: Any) -> None:
    name = str(value)
    style = {
        "cosine": "cosine", "linear": "linear", "constant": "constant", "constant_with_warmup": "constant", "cosine_with_min_lr": "cosine",
        "inverse_sqrt": "inverse-square-root",
    }.get(name)  # fmt: skip
    if name == "warmup_stable_decay":
        job.refuse(
            key,
            value,
            "give --lr_decay_style WSD, and its last steps with --lr_wsd_decay_iters; the printed command has cosine",
        )
        return
    if style is None:
        job.refuse(key, value, "no schedule here has this shape (--lr_decay_style); the printed command has cosine")
        return
    if name == "inverse_sqrt":
        job.before.append("inverse_sqrt falls from the end of the warm-up: without a warm-up it is another curve there")
    job.set(key, value, "lr_decay_style", style)
    if name == "constant":
        job.finetune["lr_warmup_iters"] = 0  # transformers' `constant` has no warm-up, whatever else is given


def scheduler_arguments(job: Job, key: str, value: Any) -> None:
    given = value if isinstance(value, dict) else _json(value)
    rate = float(job.finetune.get("lr", 1))
    if given and set(given) <= {"min_lr", "min_lr_rate"}:
        lowest = given.get("min_lr", float(given.get("min_lr_rate") or 0) * rate)
        job.set(key, value, "min_lr", float(lowest))
    else:
        job.refuse(key, value, "of the schedule only the lowest rate (--min_lr) can be set")


def _json(text: Any) -> dict[str, Any]:
    try:
        found = json.loads(str(text))
    except ValueError:
        return {}
    return found if isinstance(found, dict) else {}


def logging_steps(job: Job, key: str, value: Any) -> None:
    _interval(job, key, value, "log_interval")


def save_steps(job: Job, key: str, value: Any) -> None:
    if "save_interval" not in job.finetune:
        _interval(job, key, value, "save_interval")


def eval_steps(job: Job, key: str, value: Any) -> None:
    _interval(job, key, value, "eval_interval")


def _interval(job: Job, key: str, value: Any, flag: str) -> None:
    """Take a number of steps; below 1 it is a share of all steps."""
    steps = number(key, value)
    if 0 < steps < 1 and job.steps:
        steps = max(1, round(steps * job.steps))
    if steps < 1:
        job.refuse(key, value, f"{STEPS_LATER}; then give --{flag}")
    else:
        job.set(key, value, flag, round(steps))


def save_strategy(job: Job, key: str, value: Any) -> None:
    _strategy(job, key, value, "save_interval")


def eval_strategy(job: Job, key: str, value: Any) -> None:
    _strategy(job, key, value, "eval_interval")


def _strategy(job: Job, key: str, value: Any, flag: str) -> None:
    if value in ("steps", "no", False):
        job.ignore(key, value, "the intervals say it")
    elif value == "epoch":
        job.refuse(key, value, f"intervals are in steps: {STEPS_LATER}; then give --{flag}")
    else:
        job.refuse(key, value, "checkpoints are saved in intervals (--save_interval)")


def reports(job: Job) -> None:
    """Set what follows from the fields of a job once all keys are read: batch, steps, warm-up."""
    if job.finetune.get("lr_decay_style") == "constant" and job.finetune.pop("lr_warmup_iters", None) == 0:
        job.warmup = None
    if job.warmup and job.warmup >= 1:
        job.finetune["lr_warmup_iters"] = round(job.warmup)
    elif job.warmup and job.steps:
        job.finetune["lr_warmup_iters"] = -int(-job.warmup * job.steps // 1)
    elif job.warmup:
        job.finetune["lr_warmup_fraction"] = job.warmup


def per_epoch(flag: str) -> Handler:
    def take(job: Job, key: str, value: Any) -> None:
        job.refuse(key, value, f"intervals are in steps: {STEPS_LATER}; then give --{flag}")

    return take
