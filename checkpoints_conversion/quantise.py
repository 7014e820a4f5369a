"""Quantises a Hugging Face model while it is converted: each of its matrices once, as a whole."""

from __future__ import annotations

import threading
from collections.abc import Callable

import torch
from torch import Tensor

from megatron_ft.models.architecture import Architecture
from megatron_ft.models.dtypes import cast
from megatron_ft.models.hf_source import HfSource
from megatron_ft.models.quantised import Part, PartRule, Quantization, stored_rules, weight_of
from megatron_ft.models.weights import Placed
from megatron_ft.quantization import double, nf4

Matrix = Callable[[str], dict[Part, Tensor]]
"""f(name in Hugging Face) -> the parts of a quantised matrix."""


class Quantiser:
    """Makes the whole tensors of a quantised checkpoint. The parts of a weight are made together and kept until each was asked for."""

    def __init__(
        self, arch: Architecture, quantization: Quantization, matrix: Matrix, plain: Callable[[Placed], Tensor]
    ):
        self._arch, self._quantization, self._matrix, self._plain = arch, quantization, matrix, plain
        self._made: dict[str, dict[Part, Tensor]] = {}
        self._lock, self._locks = threading.Lock(), dict[str, threading.Lock]()

    def full(self, placed: Placed) -> Tensor:
        """Return a whole tensor of `stored_rules`."""
        if not isinstance(placed.rule, PartRule):
            return self._plain(placed)
        key = weight_of(placed).key
        with self._lock:
            lock = self._locks.setdefault(key, threading.Lock())
        with lock:
            parts = self._made.pop(key, None) or self._quantise(placed)
            found = parts.pop(placed.rule.kind)
            if parts:
                self._made[key] = parts
        return found

    def _quantise(self, placed: Placed) -> dict[Part, Tensor]:
        each = [self._matrix(name) for name in placed.hf_keys]
        rules = stored_rules([weight_of(placed).rule], self._quantization)
        return {
            rule.kind: rule.to_megatron(self._arch, [parts[rule.kind] for parts in each])
            for rule in rules
            if isinstance(rule, PartRule)
        }


def matrix_of(source: HfSource, quantization: Quantization, dtype: str | None) -> Matrix:
    """Return the function that quantises a matrix of a model, after a cast to dtype; one that is NF4 already stays as it is."""

    def matrix(name: str) -> dict[Part, Tensor]:
        if name in source.matrices:
            parts = source.matrices[name].parts()
        else:
            quantised = nf4.quantise(cast(source.tensor(name), dtype, name), name)
            parts = {"codes": quantised.codes, "absmax": quantised.absmax}
        return _second_level(parts) if quantization.double_quant and "nested" not in parts else parts

    return matrix


def _second_level(parts: dict[Part, Tensor]) -> dict[Part, Tensor]:
    second = double.quantise(parts["absmax"])
    return {"codes": parts["codes"], "absmax": second.codes, "nested": second.nested}


def stored_dtype(rules_dtype: Callable[[Placed], torch.dtype]) -> Callable[[Placed], torch.dtype]:
    """Return f(placed) -> type of a tensor of `stored_rules`. rules_dtype: of those that are not quantised."""
    return lambda one: one.rule.dtype if isinstance(one.rule, PartRule) else rules_dtype(one)
