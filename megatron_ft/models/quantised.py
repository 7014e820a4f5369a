"""The tensors of a checkpoint whose linears are NF4, as rules. A linear's weight is two or three tensors, each cut as the weight is:

    NAME.weight           codes, uint8 [out, in/2]
    NAME.weight_absmax    scales [out, in/64]: fp32, or uint8 codes with double quantisation
    NAME.weight_nested    with double quantisation, on each rank whole: fp32, for each Hugging Face matrix in turn the scale of each
                          256 scales and their mean

So every reader and writer of rules converts, cuts and joins them without knowing what they mean.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, fields
from math import prod
from typing import TYPE_CHECKING, Any, Literal

from megatron_ft.errors import CheckpointError, ConfigError
from megatron_ft.models.architecture import Architecture, check_layout
from megatron_ft.models.weights import Placed, Rule, Shape
from megatron_ft.quantization.sizes import BLOCK, nested_size

if TYPE_CHECKING:
    import torch
    from torch import Tensor

Part = Literal["codes", "absmax", "nested"]
SUFFIXES: dict[Part, str] = {"codes": "", "absmax": "_absmax", "nested": "_nested"}
_MOST_TP = 64


@dataclass(frozen=True)
class Quantization:
    """How the linears of a checkpoint are quantised."""

    double_quant: bool = False
    """The scales are quantised too."""

    @property
    def parts(self) -> tuple[Part, ...]:
        return ("codes", "absmax", "nested") if self.double_quant else ("codes", "absmax")

    def to_dict(self) -> dict[str, Any]:
        return {"quant_type": "nf4", "block_size": BLOCK, "double_quant": self.double_quant}

    @classmethod
    def from_dict(cls, entry: Any) -> Quantization:
        """Return the inverse of to_dict. Raise CheckpointError for another kind of quantisation."""
        double = entry.get("double_quant") if isinstance(entry, Mapping) else None
        if type(double) is not bool or entry != cls(double).to_dict():
            raise CheckpointError(f"quantization {str(entry)[:80]}: this version reads NF4 in blocks of {BLOCK}")
        return cls(double)


@dataclass(frozen=True, kw_only=True)
class PartRule(Rule):
    """The rule of a part of a quantised weight. hf_keys are those of the weight."""

    whole: Rule
    """The rule of the weight."""
    kind: Part
    is_codes: bool
    """uint8, not fp32"""

    @property
    def dtype(self) -> torch.dtype:
        import torch

        return torch.uint8 if self.is_codes else torch.float32


def is_quantised(rule: Rule) -> bool:
    """Return whether NF4 applies to a tensor: the matrices of a layer that tensor parallelism cuts."""
    return rule.stage == "layer" and rule.cut != "replicated" and rule.key.endswith(".weight")


def stored_rules(rules: Sequence[Rule], quantization: Quantization | None) -> list[Rule]:
    """Return the rules of the tensors in a checkpoint. None: it is not quantised."""
    if quantization is None:
        return list(rules)
    found: list[Rule] = []
    for rule in rules:
        found += _part_rules(rule, quantization).values() if is_quantised(rule) else [rule]
    return found


def parts_of(placed: Placed, quantization: Quantization) -> dict[Part, Placed]:
    """Return the places of the parts of a quantised weight."""
    return {
        part: dataclasses.replace(
            placed, rule=rule, key=placed.key + SUFFIXES[part], dist_key=placed.dist_key + SUFFIXES[part],
            local_key=placed.local_key + SUFFIXES[part],
        )
        for part, rule in _part_rules(placed.rule, quantization).items()
    }  # fmt: skip


def weight_of(placed: Placed) -> Placed:
    """Return the place of the weight of which `placed` is a part."""
    assert isinstance(placed.rule, PartRule)
    names = {name: getattr(placed, name) for name in ("key", "dist_key", "local_key")}
    without = {name: text.removesuffix(SUFFIXES[placed.rule.kind]) for name, text in names.items()}
    return dataclasses.replace(placed, rule=placed.rule.whole, **without)


def expanded_absmax(
    rule: Rule, arch: Architecture, codes: Tensor, nested: Tensor, tp_size: int = 1, tp_rank: int = 0
) -> Tensor:
    """Return fp32 scales from those of a rank's slice in 8 bits. rule: of the weight. nested: whole."""
    from megatron_ft.quantization import double

    shapes = [_scales(shape) for shape in rule.hf_shapes(arch)]
    each = nested.cpu().split([nested_size(prod(shape)) for shape in shapes])
    spread = [double.spread(part, shape) for part, shape in zip(each, shapes, strict=True)]
    whole = [rule.to_megatron(arch, list(kind)) for kind in zip(*spread, strict=True)]
    scale, mean = (rule.part(one, tp_size, tp_rank) for one in whole)
    return double.dequantise(codes.cpu(), scale, mean).to(codes.device)


class QuantisedSource:
    """Reads a quantised checkpoint in other forms. stored: returns a whole tensor of `stored_rules`."""

    def __init__(
        self, arch: Architecture, quantization: Quantization, dtype: torch.dtype, stored: Callable[[Placed], Tensor]
    ):
        self._arch, self._quantization, self._dtype, self._stored = arch, quantization, dtype, stored

    def dense(self, placed: Placed) -> Tensor:
        """Return a whole tensor as if the checkpoint were not quantised, dequantised in the checkpoint's type."""
        from megatron_ft.quantization import nf4

        if not is_quantised(placed.rule):
            return self._stored(placed)
        parts = parts_of(placed, Quantization())
        return nf4.dequantise(self._stored(parts["codes"]), self.expanded(parts["absmax"]), self._dtype)

    def expanded(self, placed: Placed) -> Tensor:
        """Return a whole tensor as a rank holds it: scales are fp32."""
        rule = placed.rule
        if not (self._quantization.double_quant and isinstance(rule, PartRule) and rule.kind == "absmax"):
            return self._stored(placed)
        parts = parts_of(weight_of(placed), self._quantization)
        return expanded_absmax(rule.whole, self._arch, self._stored(parts["absmax"]), self._stored(parts["nested"]))


def check_blocks(arch: Architecture, rules: Sequence[Rule], tp_size: int = 1) -> None:
    """Raise ConfigError, with the sizes that fit, unless the columns of each rank's slices are whole blocks."""
    for rule in filter(is_quantised, rules):
        name, columns = rule.hf_keys[0].format(n="N"), rule.full_shape(arch)[1]
        if columns % BLOCK:
            raise ConfigError(
                f"{name} has {columns} columns, no multiple of NF4's block of {BLOCK}: this model cannot be quantised so"
            )
        if not _divides(rule, arch, tp_size):
            fitting = [size for size in range(1, _MOST_TP + 1) if _fits(arch, rules, size)]
            raise ConfigError(
                f"--tensor_model_parallel_size {tp_size}: {name} has {columns} columns, {columns / tp_size:g} on a rank, "
                f"no multiple of NF4's block of {BLOCK}; sizes that fit: {', '.join(map(str, fitting)) or 'none'}"
            )


def _divides(rule: Rule, arch: Architecture, tp_size: int) -> bool:
    return rule.cut != "row_parallel" or rule.full_shape(arch)[1] % (tp_size * BLOCK) == 0


def _fits(arch: Architecture, rules: Sequence[Rule], tp_size: int) -> bool:
    try:
        check_layout(arch, tp_size)
    except ConfigError:
        return False
    return all(_divides(rule, arch, tp_size) for rule in filter(is_quantised, rules))


def _scales(shape: Shape) -> tuple[int, int]:
    return shape[0], shape[1] // BLOCK


def _part_rules(rule: Rule, quantization: Quantization) -> dict[Part, PartRule]:
    found: dict[Part, PartRule] = {
        "codes": _narrow(rule, "codes", 2, is_codes=True),
        "absmax": _narrow(rule, "absmax", BLOCK, is_codes=quantization.double_quant),
    }
    return found | ({"nested": _nested(rule)} if quantization.double_quant else {})


def _narrow(rule: Rule, part: Part, by: int, is_codes: bool) -> PartRule:
    """Return the rule of a part with fewer columns."""
    return _part(
        rule, part, is_codes,
        hf_shapes=lambda arch: [(rows, columns // by) for rows, columns in rule.hf_shapes(arch)],
        full_shape=lambda arch: (rule.full_shape(arch)[0], rule.full_shape(arch)[1] // by),
    )  # fmt: skip


def _nested(rule: Rule) -> PartRule:
    def sizes(arch: Architecture) -> list[int]:
        return [nested_size(prod(_scales(shape))) for shape in rule.hf_shapes(arch)]

    def join(arch: Architecture, tensors: Sequence[Tensor]) -> Tensor:
        import torch

        return torch.cat(list(tensors))

    return _part(
        rule, "nested", False, cut="replicated",
        hf_shapes=lambda arch: [(size,) for size in sizes(arch)],
        full_shape=lambda arch: (sum(sizes(arch)),),
        to_megatron=join,
        to_hf=lambda arch, full: list(full.split(sizes(arch))),
    )  # fmt: skip


def _part(rule: Rule, part: Part, is_codes: bool, **changes: Any) -> PartRule:
    same = {one.name: getattr(rule, one.name) for one in fields(rule)}
    return PartRule(**{**same, **changes, "key": rule.key + SUFFIXES[part]}, whole=rule, kind=part, is_codes=is_codes)
