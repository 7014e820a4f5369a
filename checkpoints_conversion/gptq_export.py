"""Exports of quantised weights: GPTQ, and W4A16 of compressed-tensors."""

from __future__ import annotations

import tempfile
import time
from dataclasses import asdict, fields
from pathlib import Path

import numpy as np

from checkpoints_conversion.calibrate import Answer, Request, run_calibration
from checkpoints_conversion.exported_words import write_words
from checkpoints_conversion.held_out import in_words, rows_of
from checkpoints_conversion.hf_target import parse_size
from checkpoints_conversion.megatron_source import Opened
from checkpoints_conversion.model_card import MODEL_CARD, Quantised, model_card
from checkpoints_conversion.options import QuantisedExport, stated_of
from checkpoints_conversion.regrouped import regroup
from checkpoints_conversion.report import Report, count
from checkpoints_conversion.stream import identity, resumable_folder, seal
from megatron_ft.errors import ConfigError
from megatron_ft.models.architecture import Architecture
from megatron_ft.models.dtypes import HF_NAMES
from megatron_ft.models.families import family_of
from megatron_ft.models.quantised import is_quantised
from megatron_ft.models.weights import Rule
from megatron_ft.quantization.gptq import Grid
from megatron_ft.quantization.packed import compressed_entry, gptq_entry

NAMES = {"gptq": "GPTQ", "w4a16": "W4A16 (compressed-tensors)"}


def export_gptq(
    source: Opened, options: QuantisedExport, max_shard_size: str, started: float, certified: bool
) -> Report:
    """Calibrate, quantise and write a model folder. Raise ConfigError for settings that do not fit the model."""
    arch = source.config.architecture
    grid, max_bytes = _grid(options), parse_size(max_shard_size)
    _check_sizes(arch, source.rules, grid)
    rows, held_out = rows_of(options, arch)
    target = Path(options.output_dir)
    key = {"options": asdict(options), "source": identity(source.files())}
    with tempfile.TemporaryDirectory() as scratch, resumable_folder(target, key, options.overwrite) as export:
        np.save(Path(scratch) / "rows.npy", rows)
        np.save(Path(scratch) / "held_out.npy", held_out)
        answer = run_calibration(_request(source, options, grid, Path(scratch), export), Path(scratch))
        files = regroup(export, answer.files, max_bytes)
        dtype = options.params_dtype or source.config.dtype
        entry = gptq_entry(grid) if options.quantize == "gptq" else compressed_entry(grid)
        config = {**family_of(arch).to_hf(arch, HF_NAMES[dtype]), "quantization_config": entry}
        write_words(source, export, config)
        quantised = _described(options, grid, answer, rows, held_out, arch)
        card = model_card(target.name, source, dtype, export, certified, options.system, quantised)
        (export / MODEL_CARD).write_text(card, encoding="utf-8")
        seal(export, {}, but=[MODEL_CARD])
    before, after = answer.perplexity
    note = f"{answer.matrices} matrices in {grid.bits} bits, perplexity {before:.4g} before, {after:.4g} after"
    parameters, tensors = count(arch, source.rules)
    return Report(target, parameters, tensors, files, time.monotonic() - started, note)


def _grid(options: QuantisedExport) -> Grid:
    """Return the grid: the columns with the largest inputs are always rounded first; only with --desc_act groups follow that order."""
    packed = options.quantize == "w4a16"
    return Grid(
        options.bits, options.group_size, symmetric=packed, desc_act=True, static_groups=packed or not options.desc_act
    )


def _check_sizes(arch: Architecture, rules: list[Rule], grid: Grid) -> None:
    per_word = 32 // grid.bits
    for rule in filter(is_quantised, rules):
        for key, (out, columns) in zip(rule.hf_keys, rule.hf_shapes(arch), strict=True):
            name = key.format(n="N")
            if columns % grid.group_size:
                raise ConfigError(
                    f"--group_size {grid.group_size}: {name} has {columns} columns, no multiple of it; choose a divisor"
                )
            if columns % per_word or (out % per_word and not grid.symmetric):
                raise ConfigError(
                    f"{name} is {out} x {columns}: both must be multiples of {per_word} to be packed in {grid.bits} bits; "
                    f"choose more --bits, or leave this model unquantised"
                )


def _request(source: Opened, options: QuantisedExport, grid: Grid, scratch: Path, export: Path) -> Request:
    described = {one.name: getattr(grid, one.name) for one in fields(grid) if one.name != "scale_dtype"}
    return Request(
        str(source.folder),
        stated_of(options),
        str(scratch),
        str(export),
        str(options.quantize),
        described,
        options.params_dtype,
    )


def _described(
    options: QuantisedExport, grid: Grid, answer: Answer, rows: np.ndarray, held_out: np.ndarray, arch: Architecture
) -> Quantised:
    order = ", desc_act" if grid.groups_follow else ""
    return Quantised(
        f"{NAMES[str(options.quantize)]}, {grid.bits} bits, groups of {grid.group_size}{order}; {answer.matrices} linears of the layers; "
        f"calibrated with {rows.size} tokens of {Path(str(options.calibration)).name}",
        in_words(answer.perplexity, held_out),
        f"{answer.error:.4f} of the outputs' norm, mean over the linears (rounded to the nearest: {answer.rounded_error:.4f})",
        falcon=arch.family == "falcon",
        kind="gptq" if options.quantize == "gptq" else "compressed-tensors",
    )
