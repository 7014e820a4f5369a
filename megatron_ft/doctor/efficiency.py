"""Checks of the overhead of a step: waits of the host, compilations, memory."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

from megatron_ft import device, gpu_facts
from megatron_ft.config.sections import Kernels, Numerics
from megatron_ft.doctor.judge import judge_compilations, judge_memory, judge_waits
from megatron_ft.doctor.result import Found, skipped
from megatron_ft.doctor.small_model import LLAMA, training
from megatron_ft.models.pipeline import plain_split
from megatron_ft.planner import memory as planner
from megatron_ft.training.invariance import ROWS

BF16_LIMA = Numerics(bf16=True, hidden_dropout=0.3, lima_dropout=True)
STEPS = 20
LARGER = replace(
    LLAMA, hidden_size=512, ffn_hidden_size=1408, num_attention_heads=8, num_query_groups=4, vocab_size=8000
)


def host_waits(folder: Path) -> Found:
    """Count the host's waits in one step, after a warm-up step."""
    if not device.has_gpu():
        return skipped("there is no GPU to wait for")
    with training(LLAMA, BF16_LIMA, Kernels(use_flash_attn=True)) as step:
        step(0)
        with gpu_facts.host_waits() as stacks:
            step(ROWS)
    return judge_waits(stacks)


def recompilations(folder: Path) -> Found:
    """Check that kernels are not compiled again when the number and lengths of the samples in a row change."""
    if not device.has_gpu():
        return skipped("nothing is compiled on a CPU")
    import torch._dynamo

    torch._dynamo.reset()  # graphs compiled by earlier checks would hide compilations
    with training(LLAMA, BF16_LIMA, Kernels(use_flash_attn=True)) as step:
        return judge_compilations([_compiled_after(step, number) for number in range(STEPS)])


def _compiled_after(step: Callable[[int], Any], number: int) -> int:
    """Take step `number`; return the number of graphs compiled since the process began."""
    from torch._dynamo.utils import counters

    step(number * ROWS)
    return counters["stats"]["unique_graphs"]


def memory(folder: Path) -> Found:
    """Compare the additional memory peak of three steps with `megatron-ft plan` for the same job."""
    gpu = device.has_gpu()
    arch, rows = (
        (replace(LARGER, hidden_size=2048, ffn_hidden_size=5632, num_attention_heads=32), 2) if gpu else (LARGER, 2)
    )
    seq_length = 2048 if gpu else 512
    arch = replace(arch, max_position_embeddings=seq_length)
    job = planner.Job(plain_split(arch.num_layers, 1), 1, 1, seq_length, 1, rows, bf16=gpu)
    device.empty_cache()
    before = device.peak_memory_bytes()
    with training(arch, Numerics(bf16=gpu), Kernels(use_flash_attn=True), seq_length, rows) as step:
        for number in range(3):
            step(number * rows)
        used = device.peak_memory_bytes() - before
    return judge_memory(used, planner.stages(arch, job)[0].total - planner.RESERVE, resident=not gpu)
