"""The kinds of quantised exports: which flags each takes, and what writes it."""

from __future__ import annotations

from dataclasses import fields

from checkpoints_conversion.megatron_source import Opened
from checkpoints_conversion.options import QuantisedExport
from checkpoints_conversion.report import Report
from megatron_ft.errors import ConfigError

_CALIBRATED = ("calibration", "calibration_rows", "calibration_length")
_TAKES: dict[str | None, tuple[str, ...]] = {
    "gptq": ("bits", "group_size", "desc_act", *_CALIBRATED),
    "w4a16": ("bits", "group_size", "desc_act", *_CALIBRATED),
    "nf4": _CALIBRATED,
    "int8": _CALIBRATED,
    "gguf-f16": _CALIBRATED,
    "gguf-q8_0": _CALIBRATED,
    None: (),
}
"""Kind -> its own flags."""
_OWN = _TAKES["gptq"]


def check_options(options: QuantisedExport) -> None:
    """Check what needs no reading of the model. Raise ConfigError."""
    defaults = {one.name: one.default for one in fields(options)}
    given = [name for name in _OWN if getattr(options, name) != defaults[name]]
    if strange := [name for name in given if name not in _TAKES[options.quantize]]:
        kinds = [str(kind) for kind, taken in _TAKES.items() if strange[0] in taken]
        here = (
            f"--quantize {options.quantize} has no use for --{strange[0]}"
            if options.quantize
            else f"--{strange[0]} is for a quantised export"
        )
        change = "choose" if options.quantize else "add"
        raise ConfigError(f"{here}: {change} --quantize {' or '.join(kinds)}, or drop --{strange[0]}")
    if options.quantize in ("gptq", "w4a16"):
        _check_gptq(options)
    if options.quantize:
        _check_rows(options, given)
    if options.quantize and options.quantize.startswith("gguf"):
        from checkpoints_conversion.gguf_export import check_installed

        check_installed()


def export_quantised(
    source: Opened, options: QuantisedExport, max_shard_size: str, started: float, certified: bool
) -> Report:
    """Write a quantised export."""
    if options.quantize in ("gguf-f16", "gguf-q8_0"):
        from checkpoints_conversion.gguf_export import export_gguf

        return export_gguf(source, options, max_shard_size, started, certified)
    if options.quantize in ("nf4", "int8"):
        from checkpoints_conversion.bitsandbytes_export import export_bitsandbytes

        return export_bitsandbytes(source, options, max_shard_size, started, certified)
    from checkpoints_conversion.gptq_export import export_gptq

    return export_gptq(source, options, max_shard_size, started, certified)


def _check_gptq(options: QuantisedExport) -> None:
    from megatron_ft.quantization.packed import GPTQ_BITS

    if not options.calibration:
        raise ConfigError(
            f"--quantize {options.quantize} needs texts to measure the inputs of each layer: set --calibration to the prefix of shards"
        )
    if options.quantize == "w4a16" and options.bits != 4:
        raise ConfigError(f"--quantize w4a16 has 4 bits, not --bits {options.bits}: drop --bits, or choose gptq")
    if options.bits not in GPTQ_BITS:
        raise ConfigError(f"--bits {options.bits}: choose {', '.join(map(str, GPTQ_BITS))}")
    if options.group_size < 1:
        raise ConfigError(f"--group_size {options.group_size}: must be at least 1")


def _check_rows(options: QuantisedExport, given: list[str]) -> None:
    if not options.calibration and (alone := [name for name in given if name in _CALIBRATED]):
        raise ConfigError(f"--{alone[0]} is about the texts of --calibration: give them, or drop --{alone[0]}")
    if options.calibration_rows < 2 or options.calibration_length < 2:
        raise ConfigError("--calibration_rows and --calibration_length must be at least 2")
