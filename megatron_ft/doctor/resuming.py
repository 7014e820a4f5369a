"""Checks that resuming is bit-exact, with saves in the foreground and background, and with fp16 before its first update."""

from __future__ import annotations

import json
from pathlib import Path

from megatron_ft.doctor.judge import FP16_SAVED_AT, FP16_STEPS, judge_fp16
from megatron_ft.doctor.ranks import run_as_ranks, run_module, several
from megatron_ft.doctor.result import Found, failed, passed
from megatron_ft.doctor.stand_ins import finetune, settings
from megatron_ft.wording import counted

STEPS = 4


def resume(folder: Path) -> Found:
    return _resume_check(folder)


def resume_async(folder: Path) -> Found:
    return _resume_check(folder, "--async_save")


def _resume_check(folder: Path, *more: str) -> Found:
    """Run `megatron-ft resume-check` with dropout and the distributed optimizer."""
    words = ["megatron_ft", "resume-check", *settings(folder, STEPS), "--check_steps", str(STEPS), "--bf16",
             "--hidden_dropout", "0.1", "--use_distributed_optimizer", *more]  # fmt: skip
    # cuBLAS is deterministic only with this setting of its workspace.
    count = several()
    ended = run_as_ranks(words, count, 200, CUBLAS_WORKSPACE_CONFIG=":4096:8")
    if ended.code != 0:
        return failed(f"{counted(count, 'process')}: {ended.reason}")
    tensors = next((line for line in ended.out.splitlines() if line.startswith("tensors of the last checkpoint")), "")
    if "of which 0 differ" not in tensors:
        return failed(f"{counted(count, 'process')}: the output does not report equal tensors: {ended.reason}")
    return passed(
        f"{STEPS} steps = {STEPS // 2}, save, resume, {STEPS // 2}; bit-exact, {counted(count, 'process')}: {tensors}"
    )


def fp16(folder: Path) -> Found:
    """Run until a save while the loss scale is still falling, and resume from there until weights are updated."""
    more = ("--fp16", "--save", folder / "fp16", "--lr_decay_iters", FP16_STEPS)
    for iters, resumes in ((FP16_SAVED_AT, ()), (FP16_STEPS, ("--auto_resume",))):
        ended = run_module(finetune(folder, *more, *resumes, iters=iters, rows=1), 80)
        if ended.code != 0:
            return failed(f"{'resumed' if resumes else 'first'} run: {ended.reason}")
    lines = map(json.loads, (folder / "fp16" / "metrics.jsonl").read_text().splitlines())
    return judge_fp16([line for line in lines if "train/loss" in line])
