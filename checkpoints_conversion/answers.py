"""The same prompts to transformers and to our model in the checkpoint's own layout; their logits, position by position, in fp32."""

from __future__ import annotations

import json
import os
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from checkpoints_conversion.layout_logits import Request, ask_in_layout
from checkpoints_conversion.megatron_source import Opened
from checkpoints_conversion.report import count
from megatron_ft.errors import CheckpointError
from megatron_ft.models.architecture import check_layout
from megatron_ft.models.dtypes import torch_dtype
from megatron_ft.models.hf_source import HfSource

_RANKS_A_CORE = 16  # forward passes of short prompts, one after another: slow, but no slower than one process by much
_PROCESS = 250 * 10**6  # bytes a forked rank needs beside its weights

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
class Asked:
    """How to ask."""

    prompts: str | None = None
    longest: int = 4096
    tolerance: float = 1e-4
    tensor_model_parallel_size: int | None = None
    pipeline_model_parallel_size: int | None = None


def compare_answers(hf: Path, opened: Opened, asked: Asked) -> dict[str, Any]:
    """What the certificate says of the logits. Raises CheckpointError where one differs by more than the tolerance."""
    config = opened.config
    tp = asked.tensor_model_parallel_size or config.tensor_model_parallel_size
    pp = asked.pipeline_model_parallel_size or config.pipeline_model_parallel_size
    check_layout(config.architecture, tp, pp)
    reason = why_not(tp * pp, count(config.architecture, opened.rules)[0])
    used = (1, 1) if reason else (tp, pp)
    ask, original = _questions(hf, opened, asked)
    with tempfile.TemporaryDirectory() as folder:
        _transformers_answer(hf, config.dtype, ask, min(_rows(hf), config.architecture.vocab_size), Path(folder))
        request = Request(str(opened.folder.resolve()), *used, ask, folder, config.architecture.vocab_size)
        worst = ask_in_layout(request, Path(folder))
    if not max(worst) <= asked.tolerance:
        raise CheckpointError(
            f"the logits of {hf} and {opened.folder} differ by {max(worst):.2e}, more than --tolerance {asked.tolerance}"
        )
    return {
        "prompts": len(ask),
        "tokens": [len(ids) for ids in ask],
        "beyond_original_context": len(ask[-1]) > original,
        "original_context": original,
        "largest_difference": max(worst),
        "largest_difference_short": max(worst[:-1]),
        "tolerance": asked.tolerance,
        "type": "fp32",
        "tensor_model_parallel_size": used[0],
        "pipeline_model_parallel_size": used[1],
        "in_one_process_because": reason,
    }


def why_not(processes: int, parameters: int) -> str | None:
    """Why so many processes are not sensible here; None where they are. Raises CheckpointError where not even one is."""
    free = available_memory()
    if free < 4 * parameters + _PROCESS:
        raise CheckpointError(
            f"{4 * parameters / 1e9:.1f} GB of weights in fp32 do not fit into {free / 1e9:.1f} GB of free memory: "
            "compare the weights alone with --no_logits, or verify on a larger machine"
        )
    cores = os.cpu_count() or 1
    if processes > _RANKS_A_CORE * cores:
        return f"{processes} processes are too many for {cores} cores"
    if free < 4 * parameters + processes * _PROCESS:
        return f"{processes} processes do not fit into {free / 1e9:.1f} GB of free memory"
    return None


def available_memory() -> int:
    """Bytes that can be used without swapping."""
    import psutil

    return psutil.virtual_memory().available


def _rows(hf: Path) -> int:
    return HfSource(hf).arch.vocab_size


def _questions(hf: Path, opened: Opened, asked: Asked) -> tuple[list[list[int]], int]:
    """(ids of every prompt, the long one last; the original context's length)."""
    arch = opened.config.architecture
    rows = min(_rows(hf), arch.vocab_size)
    # Tokens that were added for training are strange to the other model.
    texts = [[index for index in ids if index < rows] for ids in _prompts(opened, asked.prompts)]
    short = [ids[: arch.max_position_embeddings] for ids in texts]
    scaling = arch.rope_scaling or {}
    original = scaling.get("original_max_position_embeddings") or arch.max_position_embeddings
    return [*short, _stretched(texts, min(asked.longest, original + original // 4))], original


def _prompts(opened: Opened, path: str | None) -> list[list[int]]:
    """Ids of each chat, in the checkpoint's format; without a tokenizer, fixed random ids of the same lengths."""
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
    """The prompts one after another, again and again, until so long."""
    one = [index for ids in texts for index in ids]
    return (one * (length // len(one) + 1))[:length]


def _transformers_answer(hf: Path, dtype: str, prompts: list[list[int]], rows: int, folder: Path) -> None:
    """folder/N.npy: logits [tokens, rows] of prompt N in fp32, the weights rounded to the checkpoint's type first."""
    import numpy as np
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(hf, dtype=torch_dtype(dtype)).float().eval()
    with torch.no_grad():
        for number, ids in enumerate(prompts):
            np.save(folder / f"{number}.npy", model(torch.tensor([ids])).logits[0, :, :rows].numpy())
