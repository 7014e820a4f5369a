"""One rank of a layout of 8 or 32 walks a step; the others are not there, and what would come from them is made up.

Groups, shapes, who sends how often to whom, and the whole way through forward, backward and update are shown; numbers are not.
"""

from __future__ import annotations

import math

import pytest

from tests.gpu_path.nursery import GpuRanks
from tests.gpu_path.scenarios import WORLDS
from tests.gpu_path.steps import walk_alone

ROWS = 8
"""Of a global batch; one row a microbatch."""


def _stage(scenario, rank: int) -> tuple[int, int, int]:
    """(this rank's stage, chunks of layers a stage has, microbatches)."""
    stages, tp = (scenario.parallel[f"{name}_model_parallel_size"] for name in ("pipeline", "tensor"))
    chunks = 2 if "num_layers_per_virtual_pipeline_stage" in scenario.parallel else 1
    return rank // (scenario.processes // stages), chunks, ROWS * tp * stages // scenario.processes


@pytest.mark.parametrize(
    "name, rank",
    [
        pytest.param(name, rank, marks=[] if rank == 13 else [pytest.mark.thorough])
        for name, ranks in (
            ("tp8-pp4-sp-full", (0, 13, 31)),
            ("tp2-pp2-dp2-overlap", (0, 7)),
            ("tp2-pp4-vpp2-overlap", (1, 2, 7)),
        )
        for rank in ranks
    ],
)
def test_a_rank_walks_its_step(nursery, name, rank):
    scenario, ranks = WORLDS[name], GpuRanks(nursery, 1)
    results, counts = ranks.run(walk_alone, scenario, rank)[0]
    ranks.close()
    assert len(results) == 2
    for result in results:
        assert math.isfinite(result.loss) and math.isfinite(result.grad_norm) and not result.skipped
    stage, chunks, microbatches = _stage(scenario, rank)
    stages = scenario.parallel["pipeline_model_parallel_size"]
    # A chunk of layers hands its activations on unless it is the model's last, and gradients back unless it is the first.
    last, first = stage == stages - 1, stage == 0
    messages = microbatches * (2 * chunks - last - first)
    found = {kind: sum(n for (what, _), n in counts.collectives.items() if what == kind) for kind in ("send", "recv")}
    assert found == {"send": messages, "recv": messages}
