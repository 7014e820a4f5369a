"""The weights that adapters are added to, where they were trained on a quantised base: its dequantised ones, or the original ones."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from typing import Any, Literal

import torch
from torch import Tensor

from checkpoints_conversion.megatron_source import Opened
from checkpoints_conversion.stream import WORKERS
from megatron_ft.adapters.base import check_base, together
from megatron_ft.errors import CheckpointError, ConfigError
from megatron_ft.models.dtypes import cast, torch_dtype
from megatron_ft.models.fingerprint import sums
from megatron_ft.models.quantised import is_quantised
from megatron_ft.models.weights import Placed, placed_rules
from megatron_ft.quantization import double, nf4

Onto = Literal["dequantized", "original"]
IN_WORDS: dict[Onto, str] = {
    "dequantized": "the dequantised NF4 weights that the adapters were trained on",
    "original": "the original weights, not the NF4 ones that the adapters were trained on",
}


def chosen(opened: Opened, recorded: Any, quantised_later: bool, onto: Onto | None) -> Opened:
    """Return the base with the weights that adapters are to be added to, by default those that they were trained on.

    recorded: hashes of the base's weights, by type; None: not known. quantised_later: the run quantised the base after it was loaded. Raise
    ConfigError for a choice that there is not, CheckpointError for another base.
    """
    if opened.config.quantization is not None:
        return _of_quantised(opened, recorded, onto)
    if quantised_later or recorded is None:
        _check(opened, recorded)
        onto = onto or ("dequantized" if quantised_later else None)
        return _quantised(opened, opened.config.dtype) if onto == "dequantized" else replace(opened, onto=onto)
    if onto is None:
        _check(opened, recorded)
        return opened
    found = hashes_of(opened, recorded)
    if any(recorded[kind] == found[kind] for kind in recorded.keys() & found.keys()):
        raise ConfigError(f"--onto {onto}: the adapters were trained on weights that are not quantised: drop it")
    again = _with_hash(opened, recorded)
    return again if onto == "dequantized" else replace(opened, onto=onto)


def _of_quantised(opened: Opened, recorded: Any, onto: Onto | None) -> Opened:
    if onto == "original":
        raise ConfigError(
            f"--onto original: {opened.folder} is quantised: give the checkpoint of the original model with --base"
        )
    _check(opened, recorded)
    return replace(opened, onto="dequantized")


def _check(opened: Opened, recorded: Any) -> None:
    if recorded is not None:
        check_base(recorded, hashes_of(opened, recorded), opened.folder)


def hashes_of(opened: Opened, recorded: Any) -> dict[str, str]:
    """Return the hashes of a model's weights, at least of one type that `recorded` has, if it has any."""
    kinds = recorded if isinstance(recorded, Mapping) else {}

    def of(placed: Placed) -> dict[tuple[str, str], int]:
        whole = opened.full(placed)
        found = sums(whole)
        if not found.keys() & kinds.keys():
            found |= sums(whole.float())
        return {(kind, placed.dist_key): total for kind, total in found.items()}

    with ThreadPoolExecutor(WORKERS) as pool:
        return together(list(pool.map(of, placed_rules(opened.config.architecture, opened.rules))))


def _with_hash(opened: Opened, recorded: Mapping[str, str]) -> Opened:
    """Return the model quantised so that it has the recorded hash. Raise CheckpointError if it has another one in both ways."""
    dtype = "fp32" if "fp32" in recorded else next(iter(recorded), opened.config.dtype)
    for is_double in (False, True):
        again = _quantised(opened, dtype, is_double)
        found = hashes_of(again, recorded)
        if any(recorded[kind] == found[kind] for kind in recorded.keys() & found.keys()):
            return again
    raise CheckpointError(
        f"{opened.folder} is not the original of the model that the adapters were trained on: its weights in NF4 have another hash; give "
        f"the right one with --base"
    )


def _quantised(opened: Opened, dtype: str, is_double: bool = False) -> Opened:
    """Return the model in `dtype` with linears as NF4 has them."""
    arch, kind = opened.config.architecture, torch_dtype(dtype)

    def full(placed: Placed) -> Tensor:
        whole = cast(opened.full(placed), dtype, placed.key)
        if not is_quantised(placed.rule):
            return whole
        parts = placed.rule.to_hf(arch, whole)
        return placed.rule.to_megatron(arch, [_through_nf4(part, kind, placed.key, is_double) for part in parts])

    kinds: Callable[[Placed], torch.dtype] = lambda _: kind  # noqa: E731
    return replace(opened, full=full, dtype=kinds, config=replace(opened.config, dtype=dtype), onto="dequantized")


def _through_nf4(matrix: Tensor, dtype: torch.dtype, name: str, is_double: bool) -> Tensor:
    """Return a Hugging Face matrix, quantised and dequantised."""
    codes, absmax = nf4.quantise(matrix, name)
    if is_double:
        second = double.quantise(absmax)
        rows, columns = absmax.shape
        absmax = double.dequantise(second.codes, *double.spread(second.nested, (rows, columns)))
    return nf4.dequantise(codes, absmax, dtype)
