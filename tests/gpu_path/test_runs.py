"""Whole runs on the pretended GPU: load, train, evaluate, save, resume, decode; losses are those of the CPU backend's run.

Saves in the background fork a writer, in which a GPU tensor is refused.
"""

from __future__ import annotations

import numpy as np
import pytest

from megatron_ft.data.roles import ASSISTANT, PROMPTER
from megatron_ft.data.shards import ShardWriter
from tests.gpu_path.runs import RUNS, Run, Told, decode, train_save_resume
from tests.parallel.jobs import VOCAB, make_llama, to_checkpoint

LOSS = {"bf16": 2e-2, "fp16": 3e-3}
"""Bounds of losses over six steps, in nats: from the second step on, two roundings drive the weights apart."""
FAULTS: dict[str, str] = {}
"""Run -> what the product does wrong in it today."""


@pytest.fixture(scope="module")
def checkpoints(tmp_path_factory):
    """A random Llama of a number of layers, in torch_dist, which loads into any layout; made when asked for."""
    made = {}

    def of(layers: int) -> str:
        if layers not in made:
            folder = tmp_path_factory.mktemp(f"llama-{layers}")
            hf = make_llama(folder / "hf", num_hidden_layers=layers)
            made[layers] = to_checkpoint(hf, folder / "checkpoint", "torch_dist", 1, 1)
        return made[layers]

    return of


@pytest.fixture(scope="module")
def shards(tmp_path_factory):
    """Prefix of 60 random conversations, and beside it those for evaluation."""
    folder = tmp_path_factory.mktemp("shards")
    for name, seed in (("chats-train", 7), ("chats-val", 8)):
        rng = np.random.default_rng(seed)
        with ShardWriter(folder / name, VOCAB) as writer:
            for sample in range(60):
                count = int(rng.integers(4, 70))
                roles = np.where(rng.random(count) < (sample % 10) / 10, ASSISTANT, PROMPTER)
                writer.add(rng.integers(0, VOCAB, count), roles.astype(np.uint8))
    return str(folder / "chats-train")


def check(run: Run, told: Told, expected: Told) -> None:
    """Raise AssertionError where a run is not the CPU's."""
    assert told.exits == expected.exits == (0, 0)
    for name, count in (("train/loss", 6), ("eval/loss", 2)):
        found, wanted = told.values(name), expected.values(name)
        assert len(found) == len(wanted) == count
        assert abs(np.subtract(found, wanted)).max() <= LOSS["fp16" if "fp16" in run.settings else "bf16"]


def _parameter(run):
    marks = [pytest.mark.thorough] if run.thorough else []
    if run.name in FAULTS:
        marks.append(pytest.mark.xfail(strict=True, reason=FAULTS[run.name]))
    return pytest.param(run, id=run.name, marks=marks)


@pytest.mark.parametrize("run", [_parameter(run) for run in RUNS.values()])
def test_losses_are_those_of_the_cpu(run, gpus, cpus, checkpoints, shards, tmp_path):
    told, expected = (
        pools.run(run.processes, train_save_resume, run, checkpoints(run.layers), shards, str(tmp_path / where))[0]
        for pools, where in ((gpus, "gpu"), (cpus, "cpu"))
    )
    check(run, told, expected)


@pytest.mark.thorough
@pytest.mark.parametrize("processes, layout", [(1, (1, 1)), (2, (2, 1)), (2, (1, 2)), (4, (2, 2))])
def test_decoding_is_that_of_the_cpu(processes, layout, gpus, cpus, checkpoints):
    found, wanted = (pools.run(processes, decode, checkpoints(4), layout) for pools in (gpus, cpus))
    assert found == wanted
    assert all(len(answer) == 12 for answer in found[0][0])
