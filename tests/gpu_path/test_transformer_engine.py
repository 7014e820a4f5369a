"""A machine that has Transformer Engine: the engine is imported with it, its FusedAdam updates, and its attention class is there.

The package is a stub: what it computes is torch's. Its signatures are what is tried.
"""

from __future__ import annotations

import pytest

from tests.gpu_path.conftest import Pools
from tests.gpu_path.nursery import GpuRanks, Nursery
from tests.gpu_path.runs import RUNS, train_save_resume
from tests.gpu_path.scenarios import SCENARIOS
from tests.gpu_path.test_runs import check, checkpoints, shards  # noqa: F401  (fixtures)
from tests.gpu_path.test_steps import BOUNDS, difference

pytestmark = pytest.mark.thorough


@pytest.fixture(scope="module")
def with_engine():
    nursery = Nursery("transformer_engine_2")
    pools = Pools(lambda size: GpuRanks(nursery, size))
    yield pools
    pools.close()
    nursery.close()


def _found() -> tuple:
    from megatron.core import optimizer
    from megatron.core.extensions.transformer_engine import HAVE_TE, TEDotProductAttention

    from megatron_ft.config.sections import Kernels, Numerics, Parallelism
    from megatron_ft.models.kernels import check_context_parallel, choose
    from megatron_ft.models.machine import machine

    check_context_parallel(Parallelism(context_parallel_size=2), machine())
    choice = choose(Kernels(), Numerics(bf16=True), machine())
    return HAVE_TE, optimizer.Adam.__module__, choice.optimizer, TEDotProductAttention.__name__


def test_it_is_found_and_chosen(with_engine):
    assert with_engine.run(1, _found)[0] == (
        True, "transformer_engine.pytorch.optimizers", "Transformer Engine's FusedAdam", "TEDotProductAttention",
    )  # fmt: skip


@pytest.mark.parametrize("name", ["bf16", "fp16-padded-distributed", "bf16-selective-all", "bf16-full-lima"])
def test_numbers_are_those_of_the_cpu(name, with_engine, cpus):
    scenario = SCENARIOS[name]
    apart = difference(*(pools.walk(scenario)[0].measured for pools in (cpus, with_engine)))
    assert all(apart[what] <= bound for what, bound in BOUNDS[scenario.precision].items()), apart


@pytest.mark.parametrize("name", ["bf16-async-distributed", "fp16-async", "fp16-async-distributed-classic"])
def test_a_whole_run_saves_and_resumes_its_state(name, with_engine, cpus, checkpoints, shards, tmp_path):  # noqa: F811
    run = RUNS[name]
    told, expected = (
        pools.run(1, train_save_resume, run, checkpoints(run.layers), shards, str(tmp_path / where))[0]
        for pools, where in ((with_engine, "gpu"), (cpus, "cpu"))
    )
    check(run, told, expected)
