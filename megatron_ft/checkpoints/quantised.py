"""Loads quantised checkpoints: scales that are stored in 8 bits become the fp32 scales that frozen linears hold."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

import torch
from megatron.core import parallel_state
from megatron.core.dist_checkpointing.mapping import ShardedTensor
from megatron.core.transformer.utils import make_sharded_tensor_for_checkpoint

from megatron_ft.checkpoints.folder import MODEL_PREFIX, CheckpointConfig, refuse_quantised
from megatron_ft.engine.parallel import Layout
from megatron_ft.errors import CheckpointError
from megatron_ft.models.dtypes import torch_dtype
from megatron_ft.models.families import family_of
from megatron_ft.models.quantised import SUFFIXES, Quantization, expanded_absmax, is_quantised, parts_of, weight_of
from megatron_ft.models.trainable import global_name
from megatron_ft.models.weights import Placed, placed_rules
from megatron_ft.quantization.frozen import frozen_linears

_ABSMAX, _NESTED = ".weight" + SUFFIXES["absmax"], ".weight" + SUFFIXES["nested"]


def nf4_of(config: CheckpointConfig) -> torch.dtype | None:
    """Return BuildOptions.nf4 for a checkpoint."""
    return torch_dtype(config.dtype) if config.quantization else None


def check_held(folder: Path, config: CheckpointConfig, chunk: Any) -> None:
    """Raise CheckpointError unless the linears of a chunk hold what the checkpoint has. One of adapters has none."""
    if config.adapter is not None:
        return
    held = bool(frozen_linears(chunk))
    if not held and len(chunk.decoder.layers):
        refuse_quantised(folder, config)
    if held and not config.quantization:
        raise CheckpointError(
            f"{folder} is not quantised, the model is: quantise it with hf-to-megatron --quantize nf4"
        )


def ask_for_stored(weights: dict, chunk: Any, config: CheckpointConfig) -> None:
    """Change the engine's description of a chunk's weights to what the checkpoint holds, where its scales are in 8 bits."""
    if not (config.quantization and config.quantization.double_quant):
        return
    groups = {
        "tp_group": parallel_state.get_tensor_model_parallel_group(),
        "dp_cp_group": parallel_state.get_data_parallel_group(with_context_parallel=True),
    }
    for name, nested in _nested_of(chunk, config).items():
        scales = weights[MODEL_PREFIX + name + _ABSMAX]
        codes = torch.empty_like(scales.data, dtype=torch.uint8)
        also = {"dtype": torch.uint8} if isinstance(scales, ShardedTensor) else {}
        weights[MODEL_PREFIX + name + _ABSMAX] = dataclasses.replace(scales, data=codes, **also)
        whole = torch.empty(nested.rule.full_shape(config.architecture), device=codes.device)
        key = MODEL_PREFIX + nested.dist_key
        weights[MODEL_PREFIX + name + _NESTED] = make_sharded_tensor_for_checkpoint(whole, key, **groups)


def expand(weights: dict, chunk: Any, config: CheckpointConfig, layout: Layout) -> None:
    """Replace loaded scales of a chunk by fp32 ones, in place. Names are those of the chunk, all with or all without MODEL_PREFIX."""
    if not (config.quantization and config.quantization.double_quant):
        return
    prefix = MODEL_PREFIX if any(key.startswith(MODEL_PREFIX) for key in weights) else ""
    for name, nested in _nested_of(chunk, config).items():
        scales, second = weights.get(prefix + name + _ABSMAX), weights.pop(prefix + name + _NESTED, None)
        if scales is not None and second is not None:  # else `fill` names what is missing
            weights[prefix + name + _ABSMAX] = expanded_absmax(
                weight_of(nested).rule, config.architecture, scales, second, layout.tp_size, layout.tp_rank
            )


def _nested_of(chunk: Any, config: CheckpointConfig) -> dict[str, Placed]:
    """Return name of a frozen linear in the chunk -> place of its second level."""
    assert config.quantization is not None
    arch = config.architecture
    weights = placed_rules(arch, family_of(arch).rules(arch))
    nested = {
        one.key: parts_of(one, Quantization(double_quant=True))["nested"] for one in weights if is_quantised(one.rule)
    }
    return {name: nested[global_name(chunk, f"{name}.weight")] for name in frozen_linears(chunk)}
