"""verify-invariance's own layouts on the pretended GPU: in fp32, loss and every gradient are those of one CPU process."""

from __future__ import annotations

import pytest

from megatron_ft.commands.verify_invariance import CAUGHT, cases_for
from tests.gpu_path.scenarios import LLAMA

TOLERANCE = 1e-5
QUICK = ("TP2 x PP2 + sequence parallel",)


@pytest.fixture(scope="module")
def cases(cpus):
    """Name -> invariance.Case, once the engine is imported."""
    cpus.run(1, _nothing)
    return {case.name: case for case in cases_for(LLAMA)}


def _nothing() -> None:
    pass


@pytest.fixture(scope="module")
def reference(cpus, cases):
    """What one CPU process measures: {packed: Measured}."""
    from megatron_ft.training.invariance import Case, Problem, measure

    problem = Problem(LLAMA)
    return {packed: cpus.run(1, measure, problem, Case("one", 1, packing=packed))[0] for packed in (True, False)}


NAMES = (
    "TP2", "TP2 + sequence parallel", "TP4", "TP4 + sequence parallel", "PP2", "PP4", "PP2, interleaved", "PP2, uneven",
    "TP2 x PP2 + sequence parallel", "DP2", "DP4", "TP2 x DP2 + sequence parallel", "two rows at once",
)  # fmt: skip


def test_all_of_the_command_s_layouts_are_here(cases):
    assert set(cases) == {CAUGHT, *NAMES, *(name + ", padded" for name in NAMES)}


@pytest.mark.parametrize(
    "name",
    [
        pytest.param(name + end, marks=[] if name + end in QUICK else [pytest.mark.thorough])
        for end in ("", ", padded")
        for name in NAMES
    ],
)
def test_a_layout_computes_what_one_process_computes(name, gpus, cases, reference):
    from megatron_ft.training.invariance import Problem, compare, measure

    case = cases[name]
    found = gpus.run(case.processes, measure, Problem(LLAMA), case)[0]
    assert compare(reference[case.packing], found).largest < TOLERANCE


@pytest.mark.thorough
def test_the_broken_one_is_caught(gpus, cases, reference):
    from megatron_ft.training.invariance import Problem, compare, measure

    case = cases[CAUGHT]
    found = gpus.run(case.processes, measure, Problem(LLAMA), case)[0]
    assert not compare(reference[True], found).largest < TOLERANCE
