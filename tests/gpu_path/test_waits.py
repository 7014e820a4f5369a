"""How often the host waits for the device in one optimizer step of 4 layers x 8 microbatches.

Each wait empties the device's queue. A wait in a layer is paid layers x microbatches times; outside there are a few that a step cannot
do without: the gradient norm, the loss, the scale. `python -m tests.gpu_path.waits [SCENARIO...]` prints them by file and line.
"""

from __future__ import annotations

import pytest

from tests.gpu_path.scenarios import SCENARIOS

BUDGET = 10
"""Waits a step may have, whatever its layers and microbatches."""
CASES = ("bf16", "bf16-full", "tp2-sp-bf16", "pp2-bf16", "tp2-pp2-bf16")
FAULTS: dict[str, str] = {}
"""Scenario -> why it waits more often today."""


def _parameter(name: str):
    marks = [] if name in ("bf16-full", "pp2-bf16") else [pytest.mark.thorough]
    if name in FAULTS:
        marks.append(pytest.mark.xfail(strict=True, reason=FAULTS[name]))
    return pytest.param(name, marks=marks)


@pytest.fixture(scope="module")
def counts(gpus):
    """What the rank that waits most has counted in a step of a scenario, walked once."""
    found = {}

    def of(name: str):
        if name not in found:
            ranks = gpus.walk(SCENARIOS[name])
            found[name] = max((rank.counts for rank in ranks), key=lambda counts: counts.total())
        return found[name]

    return of


@pytest.mark.parametrize("name", [*map(_parameter, CASES)])
def test_no_layer_waits(counts, name):
    assert not counts(name).total(in_layer=True), counts(name).table()


@pytest.mark.parametrize("name", [*map(_parameter, CASES)])
def test_a_step_waits_a_few_times(counts, name):
    assert counts(name).total() <= BUDGET, counts(name).table()
