"""Compares fp32 logits of transformers and of this project's model in the checkpoint's layout, on the same prompts."""

from __future__ import annotations

import json
import os
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from checkpoints_conversion.layout_logits import SLACK, Request, differences_in_layout
from checkpoints_conversion.megatron_source import Opened
from checkpoints_conversion.report import count
from checkpoints_conversion.their_model import their_model
from megatron_ft.checkpoints.folder import check_quantised
from megatron_ft.errors import CheckpointError
from megatron_ft.models.architecture import check_layout
from megatron_ft.models.hf_source import HfSource
from megatron_ft.wording import counted, size

_RANKS_PER_CORE = 16  # limit; forward passes of short prompts take turns, hardly slower than in one process
_PROCESS = 250 * 10**6  # bytes that a forked rank needs besides its weights

_CHATS = (
    [{"role": "user", "content": "What colour is a plum?"}],
    [
        {"role": "system", "content": "You answer in one short sentence."},
        {"role": "user", "content": "Why is the sky blue?"},
        {"role": "assistant", "content": "Air scatters blue light more than red."},
        {"role": "user", "content": "And at sunset? Say it in French: pourquoi est-il rouge?"},
    ],
    [{"role": "user", "content": "def fib(n):\n    return n if n < 2 else fib(n - 1) + fib(n - 2)\n\nMake it fast."}],
)


@dataclass(frozen=True)
class LogitOptions:
    """The options of verify about logits."""

    prompts: str | None = None
    longest: int = 4096
    tolerance: float = 1e-4
    tensor_model_parallel_size: int | None = None
    pipeline_model_parallel_size: int | None = None


def compare_answers(hf: Path, opened: Opened, options: LogitOptions) -> dict[str, Any]:
    """Return the certificate's entry about logits. Raise CheckpointError if a difference is above the tolerance."""
    config = opened.config
    tp = options.tensor_model_parallel_size or config.tensor_model_parallel_size
    pp = options.pipeline_model_parallel_size or config.pipeline_model_parallel_size
    check_layout(config.architecture, tp, pp)
    check_quantised(config, tp)
    reason = layout_problem(tp * pp, count(config.architecture, opened.rules)[0])
    used = (1, 1) if reason else (tp, pp)
    prompts, original = _test_prompts(hf, opened, options)
    with tempfile.TemporaryDirectory() as folder:
        _write_transformers_logits(hf, opened, prompts, min(_rows(hf), config.architecture.vocab_size), Path(folder))
        size = config.architecture.vocab_size
        base = str(opened.base.resolve()) if opened.base else None
        request = Request(
            str(opened.folder.resolve()),
            *used,
            prompts,
            folder,
            size,
            opened.stated,
            base,
            config.dtype,
            opened.onto,
            options.tolerance,
        )
        worst = differences_in_layout(request, Path(folder))
    side_by_side = opened.base is not None and config.dtype == "fp32"
    if not max(worst) <= options.tolerance * (SLACK if side_by_side else 1):
        times = f"{SLACK} times " if side_by_side else ""
        raise CheckpointError(
            f"the logits of {hf} and {opened.folder} differ by {max(worst):.2e}, above {times}--tolerance {options.tolerance}; please "
            f"report it"
        )
    return {
        "prompts": len(prompts),
        "tokens": [len(ids) for ids in prompts],
        "beyond_original_context": len(prompts[-1]) > original,
        "original_context": original,
        "largest_difference": max(worst),
        "largest_difference_short": max(worst[:-1]),
        "tolerance": options.tolerance,
        "type": "fp32",
        "tensor_model_parallel_size": used[0],
        "pipeline_model_parallel_size": used[1],
        "in_one_process_because": reason,
    }


def layout_problem(processes: int, parameters: int) -> str | None:
    """Return why this machine cannot run so many processes, else None. Raise CheckpointError if it cannot run one."""
    free = available_memory()
    if free < 4 * parameters + _PROCESS:
        raise CheckpointError(
            f"{size(4 * parameters)} of weights in fp32 do not fit into {size(free)} of free memory: "
            "compare only the weights with --no_logits, or use a machine with more memory"
        )
    cores = os.cpu_count() or 1
    if processes > _RANKS_PER_CORE * cores:
        return f"{counted(processes, 'process')} are too many for {cores} cores"
    if free < 4 * parameters + processes * _PROCESS:
        return f"{counted(processes, 'process')} do not fit into {size(free)} of free memory"
    return None


def available_memory() -> int:
    """Return the bytes that can be used without swapping."""
    import psutil

    return psutil.virtual_memory().available


def _rows(hf: Path) -> int:
    return HfSource(hf).arch.vocab_size


def _test_prompts(hf: Path, opened: Opened, options: LogitOptions) -> tuple[list[list[int]], int]:
    """Return (ids of every prompt, the long one last; the length of the original context)."""
    arch = opened.config.architecture
    rows = min(_rows(hf), arch.vocab_size)
    # The Hugging Face model does not have the added tokens.
    texts = [[index for index in ids if index < rows] for ids in _prompts(opened, options.prompts)]
    short = [ids[: arch.max_position_embeddings] for ids in texts]
    scaling = arch.rope_scaling or {}
    original = scaling.get("original_max_position_embeddings") or arch.max_position_embeddings
    return [*short, _stretched(texts, min(options.longest, original + original // 4))], original


def _prompts(opened: Opened, path: str | None) -> list[list[int]]:
    """Return the ids of each chat in the checkpoint's format; without a tokenizer, fixed random ids of three lengths."""
    from megatron_ft.data.chat_format import get_format

    tokenizer, size = opened.tokenizer, opened.config.architecture.vocab_size
    if tokenizer is None:
        generator = torch.Generator().manual_seed(1)
        return [torch.randint(0, size, (length,), generator=generator).tolist() for length in (16, 60, 40)]
    chats: Sequence[Any] = (
        [json.loads(line) for line in Path(path).read_text("utf-8").splitlines() if line.strip()] if path else _CHATS
    )
    name = opened.config.chat_format
    found = []
    for chat in chats:
        messages = chat.get("messages") if isinstance(chat, dict) else chat
        if name and messages:
            ids = get_format(name).encode(tokenizer, messages, add_generation_prompt=True)[0]
        else:
            ids = tokenizer.encode(chat["text"] if not messages else "\n".join(m["content"] for m in messages))
        found.append([int(index) for index in ids])
    return found


def _stretched(texts: list[list[int]], length: int) -> list[int]:
    """Return the prompts repeated up to a length in tokens."""
    one = [index for ids in texts for index in ids]
    return (one * (length // len(one) + 1))[:length]


def _write_transformers_logits(hf: Path, opened: Opened, prompts: list[list[int]], rows: int, folder: Path) -> None:
    """Write folder/N.npy: fp32 logits [tokens, rows] of prompt N, with weights rounded to the checkpoint's type."""
    import numpy as np

    model = their_model(hf, opened)
    with torch.no_grad():
        for number, ids in enumerate(prompts):
            np.save(folder / f"{number}.npy", model(torch.tensor([ids])).logits[0, :, :rows].numpy())
