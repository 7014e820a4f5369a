"""The loss and its parts, against plain arithmetic."""

import pytest
import torch

from megatron_ft.training.objectives.cross_entropy import breakdown, weighted_sum


def test_weighted_sum_and_its_parts():
    losses = torch.tensor([[1.0, 2.0, 4.0], [8.0, 16.0, 32.0]], requires_grad=True)
    weights = torch.tensor([[1.0, 0.5, 0.0], [0.0, 2.0, 0.0]])
    groups = torch.tensor([[[0, 1, 1], [1, 1, -1]], [[0, 0, 0], [2, 2, -1]]])
    total, count, log = weighted_sum(losses, weights, groups, [2, 3])
    assert total.item() == 34.0 and count.item() == 3
    names = {"role": ("user", "assistant"), "source": ("a", "b", "c")}
    assert log[:2].tolist() == [34.0, 3.5]
    assert breakdown(log[2:].tolist(), names) == {
        "loss_by_role/user": 1.0, "loss_by_role/assistant": pytest.approx(30 / 4),
        "loss_by_source/a": pytest.approx(7 / 3), "loss_by_source/c": 12.0,
    }  # fmt: skip
    total.backward()
    assert torch.equal(losses.grad, weights)


def test_the_log_survives_the_schedule():
    """The engine divides the loss in place; what is logged must not change with it."""
    total, _, log = weighted_sum(torch.ones(1, 2), torch.ones(1, 2), torch.zeros(0, 1, 2, dtype=torch.long), [])
    total /= 7
    assert log.tolist() == [2.0, 2.0]


def test_padding_counts_nowhere():
    groups = torch.full((1, 1, 3), -1)
    _, count, log = weighted_sum(torch.full((1, 3), 9.0), torch.zeros(1, 3), groups, [4])
    assert count.item() == 0 and log.tolist() == [0.0] * 10
