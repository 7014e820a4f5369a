"""A base with adapters added to its weights, opened like a checkpoint: what merge writes and verify compares."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import torch
from torch import Tensor

from checkpoints_conversion.megatron_source import Opened, open_base, parse_iteration
from checkpoints_conversion.onto import Onto, chosen
from checkpoints_conversion.options import CheckpointSource, check_source
from checkpoints_conversion.tokenizer_copy import load_copy
from megatron_ft.adapters.find import find_base
from megatron_ft.adapters.peft_files import is_peft
from megatron_ft.adapters.spec import Projection, rows_key
from megatron_ft.adapters.stored import Stored, of_checkpoint, open_adapters
from megatron_ft.checkpoints.folder import CheckpointConfig, find_checkpoint, read_config
from megatron_ft.errors import ConfigError
from megatron_ft.models.dtypes import cast, torch_dtype
from megatron_ft.models.weights import Placed


def open_merged(
    adapters: Path, base: str | None, wanted: CheckpointSource, dtype: str | None, onto: Onto | None = None
) -> Opened:
    """Open adapters (a checkpoint or a PEFT folder) and the model they belong to, as one model in `dtype` (default: the base's).

    base: the checkpoint of the model; default: the one that the adapters name. onto: see onto.py. Raise UserError if it is not the right
    one.
    """
    return merged(*open_both(adapters, base, wanted, onto), dtype)


def merged(opened: Opened, stored: Stored, described: CheckpointConfig | None, dtype: str | None) -> Opened:
    """Return the base with its adapters as one model in `dtype` (default: the base's). described: see open_both."""
    out = dtype or opened.config.dtype
    named = {one.linear for one in stored.lora.of(opened.config.architecture)}

    def full(placed: Placed) -> Tensor:
        whole = cast(opened.full(placed), out, placed.key)
        linear = placed.rule.key.removeprefix("decoder.layers.{n}.").removesuffix(".weight")
        if placed.rule.cut == "vocab_parallel" and stored.lora.new_tokens:
            return _with_rows(placed, whole, stored)
        return _merged(placed, whole, stored, opened) if linear in named else whole

    config = replace(_described(opened.config, described), dtype=out)
    source = replace(opened, config=config, full=full, dtype=lambda _: torch_dtype(out), base=opened.folder)
    return (
        source
        if described is None
        else replace(source, folder=stored.folder, tokenizer=load_copy(stored.folder, described))
    )


def open_both(
    adapters: Path, base: str | None, wanted: CheckpointSource, onto: Onto | None = None
) -> tuple[Opened, Stored, CheckpointConfig | None]:
    """Return the base, the adapters, and the description of their checkpoint, None for a PEFT folder. Check that they belong together.

    onto: the weights of the base, if the adapters were trained on quantised ones; see onto.py.
    """
    if is_peft(adapters):
        if base is None:
            raise ConfigError(f"{adapters} is a PEFT adapter: give the checkpoint of its model with --base")
        check_source(adapters, wanted.verify_checkpoint)
        opened = open_base(Path(base), wanted)
        stored, described = open_adapters(adapters, opened.config.architecture), None
    else:
        folder = find_checkpoint(adapters, parse_iteration(wanted.iteration))
        check_source(folder, wanted.verify_checkpoint)
        described = read_config(folder)
        if described.adapter is None:
            raise ConfigError(
                f"{folder} holds a model, not adapters: give a checkpoint of a run with --lora_rank, or a PEFT folder"
            )
        opened = open_base(find_base(described, folder, base), wanted)
        stored = of_checkpoint(folder, described)
    return chosen(opened, stored.recorded, stored.nf4, onto), stored, described


def _described(base: CheckpointConfig, described: CheckpointConfig | None) -> CheckpointConfig:
    """Return the description of the merged model. That of the adapters' run has its RoPE scaling and chat format."""
    if described is None:
        return replace(base, iteration="release")
    return replace(described, adapter=None, ckpt_format=base.ckpt_format, padded_vocab_size=base.padded_vocab_size)


def _merged(placed: Placed, whole: Tensor, stored: Stored, opened: Opened) -> Tensor:
    """Return a weight with its adapters, added in fp32 and rounded once, as PEFT's merge_and_unload does on a model of this type."""
    arch, rule = opened.config.architecture, placed.rule
    by_path = {one.path: one for one in stored.lora.of(arch)}
    parts = []
    for template, part in zip(rule.hf_keys, rule.to_hf(arch, whole), strict=True):
        one: Projection | None = by_path.get(template.removesuffix(".weight"))
        if one is not None:
            part = (part.float() + stored.delta(_layer(placed), one)).to(part.dtype)
        parts.append(part)
    return rule.to_megatron(arch, parts)


def _with_rows(placed: Placed, whole: Tensor, stored: Stored) -> Tensor:
    """Return a table with the trained rows of tokens."""
    rows = stored.read(rows_key(placed.rule.key.removesuffix(".weight")))
    return whole.index_copy(0, torch.tensor(stored.lora.new_tokens), rows.to(whole.dtype))


def _layer(placed: Placed) -> int:
    return int(placed.key.split(".")[2])
