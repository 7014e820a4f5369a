"""Plans the files that hf-to-megatron would write, with exact sizes, from a config.json without the weights."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from math import prod
from pathlib import Path

import torch

from checkpoints_conversion import hf_target
from checkpoints_conversion.megatron_target import plan
from checkpoints_conversion.quantise import stored_dtype
from checkpoints_conversion.stream import Unit
from megatron_ft.checkpoints.folder import CheckpointConfig, iteration_folder
from megatron_ft.errors import CheckpointError
from megatron_ft.files import read_json
from megatron_ft.models.activation_swap import Activation, swap_activation
from megatron_ft.models.architecture import Architecture, check_layout, padded_vocab_size
from megatron_ft.models.bitsandbytes_files import without_sides
from megatron_ft.models.dtypes import HF_NAMES, torch_dtype
from megatron_ft.models.families import parse_hf_config
from megatron_ft.models.quantised import Quantization, check_blocks, stored_rules
from megatron_ft.models.weights import Rule, placed_rules
from megatron_ft.wording import counted
from megatron_ft.wording import size as in_units


def plan_units(
    input_dir: Path, output_dir: Path, tp_size: int, pp_size: int, ckpt_format: str, dtype: str | None,
    multiple: int = 128, added_tokens: int = 0, quantization: Quantization | None = None,
    activation: Activation | None = None,
) -> list[Unit]:  # fmt: skip
    """Return the weight files. dtype: None: that of config.json. added_tokens: rows beyond the source's.

    Raise CheckpointError if an index beside config.json describes another model.
    """
    hf_config = read_json(input_dir / "config.json")
    family, arch = parse_hf_config(hf_config)
    arch = swap_activation(arch, activation) if activation else arch
    check_layout(arch, tp_size, pp_size)
    rules = family.rules(arch)
    hf_dtype = hf_config.get("dtype") or hf_config.get("torch_dtype") or "float32"
    check_index(input_dir, arch, rules, getattr(torch, hf_dtype) if hf_dtype in HF_NAMES.values() else torch.float32)
    kind = dtype or next((name for name, hf_name in HF_NAMES.items() if hf_name == hf_dtype), "fp32")
    arch = replace(arch, vocab_size=arch.vocab_size + added_tokens)
    rows = padded_vocab_size(arch.vocab_size, tp_size, multiple)
    config = CheckpointConfig(arch, ckpt_format, tp_size, pp_size, rows, "release", kind)
    if quantization:
        check_blocks(arch, rules, tp_size)
    dtype_of = stored_dtype(lambda placed: torch_dtype(kind))
    return plan(iteration_folder(output_dir, "release"), config, stored_rules(rules, quantization), dtype_of)[0]


def check_index(folder: Path, arch: Architecture, rules: Sequence[Rule], dtype: torch.dtype) -> None:
    """Raise CheckpointError unless an index has the architecture's tensors and their total size."""
    path = folder / hf_target.INDEX
    if not path.is_file():
        return
    index = read_json(path)
    wanted: dict[str, tuple[int, ...]] = {}
    for placed in placed_rules(arch, rules):
        wanted.update(zip(placed.hf_keys, placed.rule.hf_shapes(arch), strict=True))
    found = {key for key in without_sides(index.get("weight_map", {})) if not key.endswith("inv_freq")}
    if found != set(wanted):
        odd = sorted(found ^ set(wanted))
        raise CheckpointError(f"{path}: {odd[0]} ({len(odd)} such) is in only one of the index and config.json's model")
    total = sum(prod(shape) for shape in wanted.values()) * dtype.itemsize
    recorded = index.get("metadata", {}).get("total_size")
    if recorded is not None and recorded != total and found == set(index["weight_map"]):
        raise CheckpointError(f"{path}: total_size {recorded}, the model of config.json has {total} bytes")


def describe(units: Sequence[Unit], root: Path) -> str:
    """Return every file with its size, and for each unit the tensors in its files."""
    lines = []
    for unit in units:
        lines += [f"{path.relative_to(root)}  {size:,} bytes" for path, size in unit.files.items()]
        lines += [f"    {key}  {list(shape)}  {size:,} bytes" for key, shape, size in unit.tensors]
    files, total = sum(len(unit.files) for unit in units), sum(unit.nbytes for unit in units)
    return "\n".join(
        [*lines, f"{counted(files, 'file')}, {counted(total, 'byte')} ({in_units(total)}); nothing was written"]
    )
