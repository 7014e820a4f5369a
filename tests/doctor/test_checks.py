"""Checks on this machine's CPU, each as it is and broken on purpose. In a rank's process: they start the engine."""

import pytest

from tests.ranks import Ranks


@pytest.fixture(scope="module")
def rank():
    ranks = Ranks(1)
    yield ranks
    ranks.close()


def attention(fault: str | None):
    import torch

    from megatron_ft.doctor import attention as checks

    def attend(query, key, value, boundaries, longest, scale, window):
        if fault == "window":
            window = window and window + 1
        if fault == "boundaries":  # the first two samples see each other
            boundaries = torch.cat([boundaries[:1], boundaries[2:]])
        if fault == "scale":
            scale *= 1.1
        if fault == "heads":  # each query head reads the next group
            key = key.roll(1, dims=1)
        return checks._by_sample(query, key, value, boundaries, longest, scale, window)

    return [checks.compared("ours", attend, dtype) for dtype in checks.BOUND]


def test_attention(rank):
    assert [found.outcome for found in rank.run(attention, None)[0]] == ["pass", "pass"]


@pytest.mark.parametrize("fault", ["window", "boundaries", "scale", "heads"])
def test_broken_attention_fails(fault, rank):
    """In bf16 as in fp32: the bounds are narrower than what the smallest mistake does."""
    for found in rank.run(attention, fault)[0]:
        assert found.outcome == "fail" and "from the formula" in found.detail, found


def steps(fault: bool):
    from pathlib import Path
    from unittest import mock

    from megatron_ft.doctor import training
    from megatron_ft.engine.optimizer import FusedAdam

    if not fault:
        return training.lima_steps(Path())
    with mock.patch.object(FusedAdam, "step", lambda self: None):
        return training.plain_steps(Path())


def test_steps(rank):
    assert rank.run(steps, False)[0].outcome == "pass"
    found = rank.run(steps, True)[0]
    assert found.outcome == "fail" and "does not fall" in found.detail


def masks(wide: bool):
    """wide: with whole numbers of 64 bits, as a compiled kernel on a GPU once had them."""
    from unittest import mock

    from megatron_ft.doctor import training
    from megatron_ft.models import dropout

    stays = dropout._keep_mask
    with mock.patch.object(dropout, "_compiled", lambda function: function):
        if not wide:
            return training.compare_masks(0.3)
        with mock.patch.object(
            dropout, "_dropped", lambda x, *numbers: x * stays(*(n.long() for n in numbers[:3])) * numbers[3]
        ):
            return training.compare_masks(0.3)


def test_masks_of_wider_arithmetic_are_noticed(rank):
    share, *wrong = rank.run(masks, False)[0]
    assert abs(share - 0.7) < 0.002 and wrong == [0, 0]
    share, *wrong = rank.run(masks, True)[0]
    assert abs(share - 0.5) < 0.002 and min(wrong) > 10**6


def memory(factor: float):
    from pathlib import Path
    from unittest import mock

    from megatron_ft.doctor import efficiency

    used = efficiency.device.peak_memory_bytes
    calls = []
    with mock.patch.object(
        efficiency.device, "peak_memory_bytes", lambda: (calls.append(1), used() * factor ** len(calls))[1]
    ):
        return efficiency.memory(Path())


def test_memory_that_is_far_from_the_plan_fails(rank):
    assert rank.run(memory, 10.0)[0].outcome == "fail"


def compilations(dynamic: bool):
    import torch

    from megatron_ft.doctor import efficiency
    from megatron_ft.doctor.judge import judge_compilations

    doubled = torch.compile(lambda x: x * 2, backend="eager", dynamic=dynamic)

    def step(consumed: int) -> None:
        doubled(torch.ones(4 + consumed))

    return judge_compilations([efficiency._compiled_after(step, number) for number in range(6)])


def test_compiled_again_is_noticed(rank):
    """By Dynamo's own counter: a function that is compiled for any size, and one that is for each."""
    assert rank.run(compilations, True)[0].outcome == "pass"
    found = rank.run(compilations, False)[0]
    assert found.outcome == "fail" and "in steps 4, 5, 6 of 6" in found.detail, found


def layouts(folder: str):
    """Run it as the runner does: in a process that is not a rank of another run."""
    import os
    from pathlib import Path

    import torch.distributed as dist

    from megatron_ft.config.sections import Parallelism
    from megatron_ft.doctor import layouts as checks
    from megatron_ft.training.invariance import Case

    dist.destroy_process_group()
    for name in ("RANK", "WORLD_SIZE", "LOCAL_RANK"):
        del os.environ[name]
    sequence = Parallelism(2, sequence_parallel=True)
    return checks.compared(Path(folder), [Case("good", 2, sequence), Case("bad", 2, sequence, broken=True)])


def test_a_layout_that_is_broken_fails(tmp_path):
    """Norms whose gradients nobody sums, through the launcher."""
    ranks = Ranks(1)
    found = ranks.run(layouts, str(tmp_path))[0]
    ranks.close()
    assert found.outcome == "fail" and "bad differs most in" in found.detail and "good" in found.detail, found
