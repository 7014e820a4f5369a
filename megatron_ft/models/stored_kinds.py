"""Kinds of quantised weights in Hugging Face folders: what config.json says, what the tensors are, and a refusal where they differ.

Only NF4 of bitsandbytes is read (bitsandbytes_files). A model that was to be quantised may have stayed dense: transformers skips classes of
linears that it does not know, such as Falcon's.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from megatron_ft.errors import CheckpointError
from megatron_ft.models.bitsandbytes_files import STATE, is_nf4

ENTRIES = ("quantization_config", "compression_config")
"""Entries of config.json about it; the second is of older releases of compressed-tensors."""
_INSTEAD = "give the unquantised model (the checkpoint, or an export without --quantize), or one in bitsandbytes' NF4"
_NAMES = {"gptq": "GPTQ", "awq": "AWQ", "compressed-tensors": "compressed-tensors", "fp8": "FP8"}
_NF4 = "bitsandbytes' NF4"
_MARKS = (
    (STATE, _NF4),
    (".quant_state.bitsandbytes__fp4", "bitsandbytes' FP4"),
    (".SCB", "bitsandbytes' int8"),
    (".qweight", "GPTQ or AWQ"),
    (".weight_packed", "compressed-tensors"),
    (".weight_scale_inv", "FP8"),
    (".weight_scale", "compressed-tensors or FP8"),
)
"""Ending of a tensor that only a quantised linear has, and the kind."""


def stated(config: Mapping[str, Any]) -> Any:
    """Return what config.json says about quantised weights; None: nothing."""
    return next((config[name] for name in ENTRIES if config.get(name) is not None), None)


def refuse_stated(config: Mapping[str, Any], where: str = "config.json") -> None:
    """Raise CheckpointError if config.json, which is at `where`, says that the weights are quantised in a kind that is not read."""
    entry = stated(config)
    if entry is not None and not is_nf4(entry):
        raise CheckpointError(
            f"{where} says {_kind(entry)}, quantised weights that megatron-ft does not read: {_INSTEAD}"
        )


def check_kinds(config: Mapping[str, Any], names: Iterable[str], folder: Path) -> None:
    """Raise CheckpointError unless the tensors are of the kind that config.json says, quantised or not."""
    entry = stated(config)
    name, found = next(((name, kind) for name in names for end, kind in _MARKS if name.endswith(end)), ("", None))
    if entry is None and found:
        raise CheckpointError(
            f"{folder}: {name} is a quantised weight ({found}), but config.json has no {ENTRIES[0]}: restore config.json, or {_INSTEAD}"
        )
    if entry is not None and found is None and _is_known(entry):
        raise CheckpointError(_stayed_dense(f"all weights of {folder} are", entry))
    if is_nf4(entry) and found != _NF4:
        raise CheckpointError(f"{folder}: {name} is {found}, config.json says {_NF4}; {_INSTEAD}")


def check_all(config: Mapping[str, Any], linears: Iterable[str], quantised: Iterable[str], folder: Path) -> None:
    """Raise CheckpointError for a linear of the layers that config.json says is quantised, and that is dense. linears: their names."""
    entry = stated(config)
    if entry is None:
        return
    kept = entry.get("llm_int8_skip_modules")
    there = set(quantised)
    dense = [name for name in linears if name not in there and not _is_kept(name, kept)]
    if dense:
        raise CheckpointError(
            _stayed_dense(f"{folder}: {dense[0]} is" + (f" ({len(dense)} such)" if len(dense) > 1 else ""), entry)
        )


def _stayed_dense(what: str, entry: Any) -> str:
    return (
        f"{what} dense, but config.json says {_kind(entry)}: transformers leaves linears that it does not know, such as Falcon's; "
        f"quantise the model again, or remove {ENTRIES[0]} from config.json"
    )


def _is_kept(name: str, kept: Any) -> bool:
    """Return whether a linear is in one of the modules that stay dense, by the rule of transformers."""
    module = f".{name.removesuffix('.weight')}."
    return any(f".{one}." in module for one in (kept if isinstance(kept, list) else []))


def _is_known(entry: Any) -> bool:
    """Return whether the linears of a kind are seen by the names of their tensors."""
    return isinstance(entry, Mapping) and entry.get("quant_method") in (*_NAMES, "bitsandbytes")


def _kind(entry: Any) -> str:
    """Return a kind in words."""
    entry = entry if isinstance(entry, Mapping) else {}
    method = entry.get("quant_method")
    if method == "bitsandbytes":
        if entry.get("load_in_8bit"):
            return "bitsandbytes' int8 (LLM.int8())"
        return f"bitsandbytes' {_short(entry.get('bnb_4bit_quant_type', 'fp4')).upper()}"
    if isinstance(method, str) and method in _NAMES:
        return f"{_NAMES[method]} (quant_method {method})"
    return f"quant_method {_short(method)}"


def _short(value: Any) -> str:
    return re.sub(r"[^\w.-]", "?", str(value))[:40]
