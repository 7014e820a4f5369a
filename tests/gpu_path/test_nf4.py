"""Frozen linears over NF4 on the pretended GPU, with and without bitsandbytes: the numbers of the CPU."""

from __future__ import annotations

import contextlib
import dataclasses
import sys
from collections.abc import Iterator
from typing import Any

import numpy as np
import pytest

from tests.conversion.builders import make_family
from tests.gpu_path.nursery import STUBS
from tests.quantization.jobs import answers, freeze
from tests.quantization.test_checkpoints import SIZES, to_nf4
from tests.quantization.test_frozen import LLAMA, REST

TOLERANCE = 1e-5
SMALL = dataclasses.replace(LLAMA, num_layers=2)


def measured(size: int, packages: str | None, broken: bool = False, **numerics: Any) -> tuple:
    """(what invariance.measure finds in a layout of `size` ranks, calls of bitsandbytes' kernel, the chosen function)."""
    from megatron_ft.config.sections import Numerics, Parallelism
    from megatron_ft.quantization import kernels
    from megatron_ft.training.invariance import Case, Problem, measure

    parallel = Parallelism(size, sequence_parallel=size > 1)
    problem = Problem(SMALL, numerics=Numerics(**numerics), trainable=REST)
    with installed(packages, broken) as library:
        found = measure(problem, Case("some", size, parallel), freeze)
        return found, library.calls if library else 0, kernels.dequantiser().__name__


@contextlib.contextmanager
def installed(package: str | None, broken: bool) -> Iterator[Any]:
    from megatron_ft.quantization import kernels

    folders = [str(STUBS / package)] if package else []
    sys.path[:0] = folders
    kernels.dequantiser.cache_clear()
    library = None
    try:
        if package:
            from bitsandbytes import functional as library

            library.calls, library.broken = 0, broken
        yield library
    finally:
        for folder in folders:
            sys.path.remove(folder)
        for name in ("bitsandbytes", "bitsandbytes.functional"):
            sys.modules.pop(name, None)
        kernels.dequantiser.cache_clear()


CASES = [
    pytest.param(1, {}, id="one"),
    pytest.param(2, {}, id="TP2", marks=pytest.mark.thorough),
    pytest.param(1, {"recompute_granularity": "full"}, id="one, recompute", marks=pytest.mark.thorough),
    pytest.param(2, {"recompute_granularity": "full"}, id="TP2, recompute"),
]


@pytest.mark.parametrize("size, numerics", CASES)
def test_numbers_are_those_of_the_cpu(size, numerics, gpus, cpus):
    from megatron_ft.training.invariance import compare

    reference, _, by = cpus.run(1, call, 1, None, False, numerics)[0]
    assert by == "dequantise"
    for package, expected in ((None, "dequantise"), ("bitsandbytes_0_50", "by_bitsandbytes")):
        found, calls, by = gpus.run(size, call, size, package, False, numerics)[0]
        assert compare(reference, found).largest < TOLERANCE
        assert by == expected
        # Two steps of 8 rows; in each layer four linears, forward and backward, with recomputation forward twice. One call was a trial.
        each = 8 * 2 * 4 * (3 if numerics else 2)
        assert calls == (2 * each + 1 if package else 0)


def test_in_half_precision(gpus, cpus):
    from megatron_ft.training.invariance import compare

    reference = cpus.run(1, call, 1, None, False, {"bf16": True})[0][0]
    found = gpus.run(1, call, 1, "bitsandbytes_0_50", False, {"bf16": True})[0][0]
    apart = compare(reference, found)
    assert apart.loss < 2e-3 and apart.grad_norm < 4e-2


def test_a_library_that_gives_other_numbers_is_not_used(gpus):
    found, calls, by = gpus.run(1, call, 1, "bitsandbytes_0_50", True, {})[0]
    assert found is not None and (calls, by) == (1, "dequantise")


def call(size: int, package: str | None, broken: bool, numerics: dict) -> tuple:
    return measured(size, package, broken, **numerics)


def test_a_quantised_checkpoint_answers_alike(gpus, cpus, tmp_path):
    """Loaded with scales in 8 bits, in both formats."""
    make_family(tmp_path / "hf", "llama", **SIZES)
    roots = [
        str(to_nf4(tmp_path / "hf", tmp_path / kind, 2, ckpt_format=kind, double_quant=True))
        for kind in ("torch_dist", "torch")
    ]
    prompt = np.arange(10)
    expected, found = (pools.run(2, answers, roots, (2, 1), prompt) for pools in (cpus, gpus))
    assert expected == found and len(set(map(tuple, found[0]))) == 1
