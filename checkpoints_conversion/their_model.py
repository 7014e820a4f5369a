"""The model of transformers that verify compares with, in fp32, with the weights that the checkpoint's type and NF4 leave of it."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch

from checkpoints_conversion.megatron_source import Opened
from megatron_ft.models.activation_swap import before_swap, entry_of
from megatron_ft.models.dtypes import torch_dtype
from megatron_ft.models.hf_source import HfSource
from megatron_ft.models.quantised import is_quantised
from megatron_ft.models.weights import placed_rules


def their_model(hf: Path, opened: Opened) -> Any:
    """Return the model in the folder hf, with the activation that the checkpoint swapped for its own.

    Of a quantised checkpoint, its linears have the dequantised weights.
    """
    from transformers import AutoConfig, AutoModelForCausalLM

    source, dtype = HfSource(hf), torch_dtype(opened.config.dtype)
    config = AutoConfig.from_pretrained(hf)
    if swap := before_swap(source.arch, opened.config.architecture):
        setattr(config, entry_of(source.arch).key, swap.after)
    if source.quantization:
        model = _without_bitsandbytes(source, config, dtype)
    else:
        model = AutoModelForCausalLM.from_pretrained(hf, config=config, dtype=dtype)
    if opened.config.quantization and not source.quantization:
        _dequantise(model, opened)
    return model.float().eval()


def _without_bitsandbytes(source: HfSource, config: Any, dtype: torch.dtype) -> Any:
    from transformers import AutoModelForCausalLM

    del config.quantization_config
    model = AutoModelForCausalLM.from_config(config, dtype=dtype)
    parameters = dict(model.named_parameters())
    with torch.no_grad():
        for name in source.files:
            if name in parameters:
                parameters.pop(name).copy_(source.tensor(name))
    assert not parameters, f"not filled: {sorted(parameters)}"  # tied ones are there once
    return model


@torch.no_grad()
def _dequantise(model: Any, opened: Opened) -> None:
    arch = opened.config.architecture
    for placed in placed_rules(arch, opened.rules):
        if is_quantised(placed.rule):
            for name, matrix in zip(placed.hf_keys, placed.rule.to_hf(arch, opened.full(placed)), strict=True):
                model.get_parameter(name).copy_(matrix)
