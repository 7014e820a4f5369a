"""The same prompts to transformers and to our model in this process; their logits, position by position, in fp32."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from checkpoints_conversion.megatron_source import Opened
from megatron_ft.errors import CheckpointError
from megatron_ft.models.hf_source import HfSource
from megatron_ft.models.weights import Placed, pad_rows, placed_rules

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


def compare_answers(hf: Path, opened: Opened, prompts: str | None, longest: int, tolerance: float) -> dict[str, Any]:
    """What the certificate says of the logits. Raises CheckpointError where one differs by more than `tolerance`."""
    arch = opened.config.architecture
    rows = min(HfSource(hf).arch.vocab_size, arch.vocab_size)
    # Tokens that were added for training are strange to the other model.
    texts = [[index for index in ids if index < rows] for ids in _prompts(opened, prompts)]
    short = [ids[: arch.max_position_embeddings] for ids in texts]
    scaling = arch.rope_scaling or {}
    original = scaling.get("original_max_position_embeddings") or arch.max_position_embeddings
    long = _stretched(texts, min(longest, original + original // 4))
    ask = [*short, long]
    theirs = _of_transformers(hf, ask)
    ours = _of_ours(opened, ask)
    worst = [(a[..., :rows] - b[..., :rows]).abs().max().item() for a, b in zip(theirs, ours, strict=True)]
    if not max(worst) <= tolerance:
        raise CheckpointError(
            f"the logits of {hf} and {opened.folder} differ by {max(worst):.2e}, more than --tolerance {tolerance}"
        )
    return {
        "prompts": len(ask),
        "tokens": [len(ids) for ids in ask],
        "beyond_original_context": len(long) > original,
        "original_context": original,
        "largest_difference": max(worst),
        "largest_difference_short": max(worst[:-1]),
        "tolerance": tolerance,
        "type": "fp32",
    }


def _prompts(opened: Opened, path: str | None) -> list[list[int]]:
    """Ids of each chat, in the checkpoint's format; without a tokenizer, fixed random ids of the same lengths."""
    from megatron_ft.data.chat_format import get_format

    tokenizer, size = opened.tokenizer, opened.config.architecture.vocab_size
    if tokenizer is None:
        generator = torch.Generator().manual_seed(1)
        return [torch.randint(0, size, (length,), generator=generator).tolist() for length in (16, 60, 40)]
    chats = (
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


def _of_transformers(hf: Path, prompts: list[list[int]]) -> list[Tensor]:
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(hf, dtype=torch.float32).eval()
    with torch.no_grad():
        return [model(torch.tensor([ids])).logits[0] for ids in prompts]


def _of_ours(opened: Opened, prompts: list[list[int]]) -> list[Tensor]:
    """Our engine in one process, with the weights as the checkpoint's own files give them."""
    from megatron_ft.parallel import process_groups

    arch = opened.config.architecture
    with process_groups(1, 1) as layout, torch.no_grad():
        from megatron_ft.models.build import BuildOptions, build_model

        rows = opened.config.padded_vocab_size
        model = build_model(arch, layout, BuildOptions(padded_vocab_size=rows)).eval()
        slots = dict(model.named_parameters())

        def fill(placed: Placed) -> None:
            full = opened.full(placed).float()
            slots.pop(placed.local_key).copy_(pad_rows(full, rows) if placed.rule.cut == "vocab_rows" else full)

        for placed in placed_rules(arch, opened.rules):
            fill(placed)
        assert not slots, f"not filled: {sorted(slots)}"
        answers = []
        for ids in prompts:
            tokens = torch.tensor([ids])
            logits = model(tokens, torch.arange(len(ids))[None], None)
            answers.append(logits[0, :, : arch.vocab_size].float().cpu())
        return answers
