"""Loads a checkpoint or an export into megatron-core, as generate does; in 4 bits its linears hold our NF4 (quantization/frozen.py)."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from math import prod
from pathlib import Path
from typing import Any

import torch

from megatron_ft import device
from megatron_ft.errors import ConfigError
from megatron_ft.evaluation.measuring.clock import median_ms
from megatron_ft.evaluation.measuring.job import Job, Loaded, Measured, Product, check_lengths, together

KINDS = {32: "fp32, engine", 16: "bf16, engine", 4: "nf4, engine"}


@contextlib.contextmanager
def loaded(job: Job) -> Iterator[Loaded]:
    """Yield the model of a job, or this process's part of it. One that is not quantised is loaded in bf16 first, then quantised."""
    from megatron_ft.engine.parallel import ParallelSizes, process_groups
    from megatron_ft.generation.loading import open_chat_model

    with process_groups(ParallelSizes(job.tp, job.pp)) as layout:
        adapter = Path(job.adapter) if job.adapter else None
        chat = open_chat_model(Path(job.model), layout, bf16=job.bits != 32, adapter=adapter)
        prompts = [chat.prompt_ids(messages).tolist() for messages in job.conversations]
        check_lengths(prompts, job.max_new_tokens, chat.decoder.max_positions)
        _to_bits(chat.decoder.model, job.bits)
        chat.decoder.stop_ids = set()

        def generate(ids: list[int], count: int) -> list[int]:
            return chat.decoder.generate([torch.tensor(ids).numpy()], count)[0]

        def decode(ids: list[int]) -> str:
            return chat.tokenizer.decode(ids, skip_special=True)

        model = chat.decoder.model
        kind = KINDS[job.bits] + (f", TP{job.tp} x PP{job.pp}" if job.processes > 1 else "")
        yield Loaded(
            kind, prompts, generate, decode, weight_bytes(model), lambda: time_product(model), lambda own: _of_all(own)
        )


def _of_all(own: Measured) -> Measured:
    """Return the result of the whole model, on every process."""
    import torch.distributed as dist

    parts: list[Any] = [None] * dist.get_world_size()
    dist.all_gather_object(parts, own)
    return together(parts)


def _to_bits(model: Any, bits: int) -> None:
    """Quantise the linears for 4 bits, unless they are. Raise ConfigError where they are and more bits were asked for."""
    from megatron_ft.quantization.frozen import freeze_linears, frozen_linears

    held = bool(frozen_linears(model))
    if held and bits != 4:
        raise ConfigError("the linears of this model are in 4 bits already: give --bits 4")
    if bits == 4 and not held:
        freeze_linears(model, torch.bfloat16)


def weight_bytes(model: Any) -> int:
    return sum(weight.numel() * weight.element_size() for weight in (*model.parameters(), *model.buffers()))


@torch.inference_mode()
def time_product(model: Any) -> Product:
    """Time one token through the linear with the most weights, or this process's part of it, and making its plain weight."""
    from megatron_ft.quantization.frozen import FrozenLinear

    linears = {
        name: one for name, one in model.decoder.named_modules() if hasattr(one, "output_size") and _is_alone(one)
    }
    name, module = max(linears.items(), key=lambda pair: prod(_part(pair[1])))
    kind = next(weight.dtype for weight in model.parameters() if weight.is_floating_point())
    row = torch.randn(1, 1, _part(module)[1], device=device.current_device(), dtype=kind)
    made = None
    if isinstance(module, FrozenLinear):
        made = median_ms(lambda: module.dense(module.weight, module.weight_absmax, kind))
    return Product(name, _part(module), median_ms(lambda: module(row)), made)


def _is_alone(module: Any) -> bool:
    """Say if a linear multiplies without the other ranks: one whose columns are cut sums with them."""
    return _part(module)[1] == module.input_size


def _part(module: Any) -> tuple[int, int]:
    """Return rows and columns of a linear's weights on this rank."""
    rows = getattr(module, "output_size_per_partition", module.output_size)
    columns = getattr(module, "input_size_per_partition", module.input_size)
    return rows, columns
