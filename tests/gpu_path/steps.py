"""What ranks do in a scenario: training/invariance.measure, with what is counted in its second step. Module-level, so that it travels."""

from __future__ import annotations

import contextlib
import os
import sys
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from tests.gpu_path.pretended import compiling, groups, report, varlen
from tests.gpu_path.scenarios import ARCHITECTURES, Scenario

STUBS = Path(__file__).parent / "stubs"


@dataclass
class Walked:
    """What one rank has to say of a scenario."""

    measured: Any
    """invariance.Measured; None but on rank 0"""
    counts: report.Counts
    """of the second step: the first also makes state"""
    graphs: Counter = field(default_factory=Counter)
    """compiled function -> graphs that Dynamo made of it"""
    compiled_calls: Counter = field(default_factory=Counter)
    not_compiled: dict[str, str] = field(default_factory=dict)
    """compiled function -> what Dynamo said"""
    destroyed: list[str] = field(default_factory=list)
    """groups, in the order in which they were destroyed"""


def walk(scenario: Scenario, trace_with: str | None = None) -> Walked:
    """Run a scenario on this rank. trace_with: a Dynamo backend for all that is compiled."""
    from megatron_ft.training import invariance
    from tests.quantization.jobs import freeze

    numerics, parallel, kernels = scenario.sections()
    case = invariance.Case(
        scenario.name, scenario.processes, parallel, packing=scenario.packing, broken=scenario.broken,
        kernels=kernels,
    )  # fmt: skip
    architecture = ARCHITECTURES[scenario.architecture]
    problem = invariance.Problem(architecture, numerics=numerics, lora=_adapters(scenario))
    groups.DESTROYED.clear()
    compiling.trace(trace_with)
    with _installed(scenario), _counted_steps() as steps:
        measured = invariance.measure(problem, case, freeze if scenario.nf4 else None)
    found = Walked(
        measured, steps[-1], Counter(compiling.GRAPHS), Counter(compiling.CALLS), dict(compiling.FAILED),
        list(groups.DESTROYED),
    )  # fmt: skip
    compiling.trace(None)
    return found


def _adapters(scenario: Scenario) -> Any:
    from megatron_ft.adapters.spec import Lora, ordered

    targets = ordered(("all",), ARCHITECTURES[scenario.architecture])
    return Lora(targets=targets, **scenario.lora) if scenario.lora else None


def walk_alone(scenario: Scenario, rank: int) -> tuple[list, report.Counts]:
    """Run a scenario as one rank of its world whose other ranks are not there. Return both steps' results, and the second's counts.

    This process's own world ends here, so it is good for nothing else afterwards.
    """
    import torch.distributed as dist

    from megatron_ft.training import invariance

    dist.destroy_process_group()
    size = scenario.processes
    os.environ.update(RANK=str(rank), WORLD_SIZE=str(size), LOCAL_RANK=str(rank % 8), MASTER_ADDR="nowhere")
    groups.carry_nothing(True)
    # What only a whole world can tell: everybody's gradients, and the loss on ranks that do not have it.
    invariance._gathered, invariance._from_reporter = (lambda *_: {}), (lambda _, values: values)
    numerics, parallel, kernels = scenario.sections()
    problem = invariance.Problem(ARCHITECTURES[scenario.architecture], numerics=numerics, lora=_adapters(scenario))
    with _counted_steps() as steps, _results() as results:
        invariance.measure(problem, invariance.Case(scenario.name, size, parallel, kernels=kernels))
    return results, steps[-1]


@contextlib.contextmanager
def _results() -> Iterator[list]:
    """Yield a list that gets each step's StepResult."""
    from megatron_ft.training import step

    results: list = []
    plain = step.Stepper._result

    def kept(self: Any, *args: Any, **more: Any) -> Any:
        results.append(plain(self, *args, **more))
        return results[-1]

    step.Stepper._result = kept
    try:
        yield results
    finally:
        step.Stepper._result = plain


@contextlib.contextmanager
def _installed(scenario: Scenario) -> Iterator[None]:
    """Packages and releases that this scenario's machine has, and the product's eyes opened for them."""
    installed = {"flash_attn_2_8": scenario.flash_attn, "bitsandbytes_0_50": scenario.bitsandbytes}
    folders = [str(STUBS / name) for name, there in installed.items() if there]
    sys.path[:0] = folders
    try:
        with varlen.release(scenario.varlen):
            _look_again()
            yield
    finally:
        for folder in folders:
            sys.path.remove(folder)
        for name in ("flash_attn", "bitsandbytes", "bitsandbytes.functional"):
            sys.modules.pop(name, None)
        _look_again()


def _look_again() -> None:
    """What the machine has is found once in a process."""
    from megatron_ft.models import machine
    from megatron_ft.quantization import kernels

    machine.machine.cache_clear()
    machine.varlen_arguments.cache_clear()
    kernels.dequantiser.cache_clear()


@contextlib.contextmanager
def _counted_steps() -> Iterator[list[report.Counts]]:
    """Yield a list that gets what was counted in each step."""
    from megatron_ft.training import invariance

    steps: list[report.Counts] = []

    class CountedStepper(invariance.Stepper):
        def train(self, *args: Any) -> Any:
            report.restart()
            result = super().train(*args)
            steps.append(report.counted())
            return result

    plain, invariance.Stepper = invariance.Stepper, CountedStepper
    try:
        yield steps
    finally:
        invariance.Stepper = plain
