"""Exports as transformers saves them with bitsandbytes: NF4 (load_in_4bit) and LLM.int8() (load_in_8bit). bitsandbytes is not needed.

Source: bitsandbytes/functional.py (QuantState, int8_vectorwise_quant), bitsandbytes/nn/modules.py (Linear8bitLt).
"""

from __future__ import annotations

import json
import time
from dataclasses import asdict
from math import prod
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from checkpoints_conversion.exported_words import write_words
from checkpoints_conversion.hf_target import Entry, parse_size, plain_entries, plan_safetensors, write_index
from checkpoints_conversion.megatron_source import Opened
from checkpoints_conversion.model_card import MODEL_CARD, Quantised, model_card
from checkpoints_conversion.options import QuantisedExport
from checkpoints_conversion.report import Report, count
from checkpoints_conversion.rounded_perplexity import described, held_out_of
from checkpoints_conversion.rounding import int8_codes, int8_dense
from checkpoints_conversion.stream import identity, resumable_folder, seal, write_units
from megatron_ft.models.bitsandbytes_files import STATE
from megatron_ft.models.dtypes import HF_NAMES, cast, torch_dtype
from megatron_ft.models.families import family_of
from megatron_ft.models.quantised import check_blocks, is_quantised
from megatron_ft.models.weights import Placed, Shape, placed_rules
from megatron_ft.quantization import nf4
from megatron_ft.quantization.sizes import BLOCK

NAMES = {"nf4": "NF4 in blocks of 64", "int8": "LLM.int8(): a scale for each row, inputs are rounded too when it runs"}


def export_bitsandbytes(
    source: Opened, options: QuantisedExport, max_shard_size: str, started: float, certified: bool
) -> Report:
    """Quantise the linears of the layers and write a model folder. Raise ConfigError for sizes that NF4's blocks do not fit."""
    config, rules, target = source.config, source.rules, Path(options.output_dir)
    arch, dtype, method = config.architecture, options.params_dtype or config.dtype, str(options.quantize)
    if method == "nf4":
        check_blocks(arch, rules)
    format_, held_out = _Format(source, method, dtype), held_out_of(source, options)
    key = {"options": asdict(options), "source": identity(source.files())}
    with resumable_folder(target, key, options.overwrite) as export:
        placed, size = placed_rules(arch, rules), parse_size(max_shard_size)
        units = plan_safetensors(export, placed, arch, format_.dtype, size, format_.entries, format_.values)
        weights = write_units(units, source.full, f"writing {target.name}:")
        write_index(export, units)
        write_words(
            source,
            export,
            {**family_of(arch).to_hf(arch, HF_NAMES[dtype]), "quantization_config": entry(method, dtype)},
        )
        quantised = format_.described(described(source, options, dtype, held_out))
        card = model_card(target.name, source, dtype, export, certified, options.system, quantised)
        (export / MODEL_CARD).write_text(card, encoding="utf-8")
        seal(export, weights, but=[MODEL_CARD])
    parameters, tensors = count(arch, rules)
    return Report(target, parameters, tensors, len(units), time.monotonic() - started, quantised.in_short())


def entry(method: str, dtype: str) -> dict[str, Any]:
    """Return quantization_config of config.json."""
    return {
        "quant_method": "bitsandbytes",
        "load_in_4bit": method == "nf4",
        "load_in_8bit": method == "int8",
        "bnb_4bit_compute_dtype": HF_NAMES[dtype],
        "bnb_4bit_quant_storage": "uint8",
        "bnb_4bit_quant_type": "nf4",
        "bnb_4bit_use_double_quant": False,
        "llm_int8_enable_fp32_cpu_offload": False,
        "llm_int8_has_fp16_weight": False,
        "llm_int8_skip_modules": None,
        "llm_int8_threshold": 6.0,
    }


class _Format:
    """The tensors of the files. Measures how much each matrix is changed."""

    def __init__(self, source: Opened, method: str, dtype: str):
        self._source, self._method, self._dtype = source, method, dtype
        self._arch = source.config.architecture
        self._errors: list[float] = []

    def dtype(self, one: Placed) -> torch.dtype:
        return torch_dtype(self._dtype)

    def entries(self, one: Placed) -> list[Entry]:
        if not is_quantised(one.rule):
            return plain_entries(one, self._arch, torch_dtype(self._dtype))
        pairs = zip(one.hf_keys, one.rule.hf_shapes(self._arch), strict=True)
        return [each for name, shape in pairs for each in self._sizes(name, shape)]

    def values(self, one: Placed, full: Tensor) -> list[Tensor]:
        parts = one.rule.to_hf(self._arch, cast(full, self._dtype, one.key))
        if not is_quantised(one.rule):
            return list(parts)
        make = self._nf4 if self._method == "nf4" else self._int8
        return [value for name, part in zip(one.hf_keys, parts, strict=True) for value in make(name, part.contiguous())]

    def described(self, perplexity: str) -> Quantised:
        error = f"{sum(self._errors) / max(1, len(self._errors)):.2g} of the weights' norm, mean over {len(self._errors)} linears"
        falcon = self._arch.family == "falcon"
        return Quantised(
            f"bitsandbytes, {NAMES[self._method]}; linears of the layers", perplexity, error, falcon, "bitsandbytes"
        )

    def _sizes(self, name: str, shape: Shape) -> list[Entry]:
        if self._method == "nf4":
            return [
                (name, torch.uint8, (prod(shape) // 2, 1)),
                (name + ".absmax", torch.float32, (prod(shape) // BLOCK,)),
                (name + ".quant_map", torch.float32, (len(nf4.LEVELS),)),
                (name + STATE, torch.uint8, (len(self._state(shape)),)),
            ]
        stem = name.removesuffix("weight")
        return [
            (name, torch.int8, shape),
            (stem + "SCB", torch.float32, shape[:1]),
            (stem + "weight_format", torch.uint8, ()),
        ]

    def _state(self, shape: Shape) -> bytes:
        state = {"quant_type": "nf4", "blocksize": BLOCK, "dtype": HF_NAMES[self._dtype], "shape": list(shape)}
        return json.dumps(state).encode()

    def _nf4(self, name: str, weight: Tensor) -> list[Tensor]:
        found = nf4.quantise(weight, name)
        self._measure(weight, nf4.dequantise(found.codes, found.absmax, weight.dtype))
        state = torch.tensor(list(self._state((weight.shape[0], weight.shape[1]))), dtype=torch.uint8)
        return [found.codes.reshape(-1, 1), found.absmax.reshape(-1), torch.tensor(nf4.LEVELS), state]

    def _int8(self, name: str, weight: Tensor) -> list[Tensor]:
        codes, largest = int8_codes(name, weight)
        self._measure(weight, int8_dense(codes, largest))
        return [codes, largest, torch.zeros((), dtype=torch.uint8)]  # 0: rows one after the other

    def _measure(self, weight: Tensor, found: Tensor) -> None:
        norm = weight.float().norm().item()
        self._errors.append((found.float() - weight.float()).norm().item() / norm if norm else 0.0)
