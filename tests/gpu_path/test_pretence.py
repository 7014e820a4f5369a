"""The pretended GPU refuses, counts and matches what it says it does: a pretence that lets everything pass proves nothing."""

from __future__ import annotations

import pytest
import torch

from tests.gpu_path import pretence_jobs as jobs
from tests.gpu_path.pretended import attention


@pytest.mark.parametrize("name", jobs.REFUSED)
def test_what_a_gpu_refuses_is_refused(gpus, name):
    assert gpus.run(1, jobs.refusal, name)[0] is not None


@pytest.mark.parametrize("name", jobs.WAITS)
def test_a_wait_of_the_host_is_counted(gpus, name):
    assert gpus.run(1, jobs.waits, name)[0] == 1


@pytest.mark.parametrize("name", jobs.NO_WAIT)
def test_what_only_queues_work_is_not_counted(gpus, name):
    assert gpus.run(1, jobs.waits, name)[0] == 0


def test_each_rank_has_a_gpu_of_its_own(gpus):
    kind = "torch.cuda.FloatTensor"
    assert gpus.run(2, jobs.where_it_is) == [(f"cuda:{n}", True, n, kind, f"cuda:{n}") for n in (0, 1)]


@pytest.mark.parametrize("how", ["computes", "reads", "pickles", "makes", "waits"])
def test_a_forked_child_may_not_touch_the_gpu(gpus, how):
    assert "forked subprocess" in gpus.run(1, jobs.in_a_fork, how)[0]


def test_messages_meet_in_the_order_in_which_they_were_posted(gpus):
    """Where both post "previous" first, as the engine does in a batch, what is sent to the previous stage arrives as if from it."""
    assert gpus.run(2, jobs.exchanged, "matched") == [[11, 12], [1, 2]]
    assert gpus.run(2, jobs.exchanged, "previous first on both") == [[12, 11], [2, 1]]


def test_the_gpu_has_its_own_random_stream(gpus):
    assert gpus.run(1, jobs.random_streams)[0] == (True, True)


def test_tracing_tells_one_graph_from_several_and_from_none(gpus):
    calls, graphs, failure = gpus.run(1, jobs.traced, "whole")[0]
    assert (calls, failure) == (4, None) and graphs <= 2  # the first number is taken for a constant
    assert gpus.run(1, jobs.traced, "specialised")[0] == (4, 4, None)
    calls, graphs, failure = gpus.run(1, jobs.traced, "broken")[0]
    assert (calls, graphs) == (4, 0) and "item" in failure


@pytest.mark.parametrize("groups", [4, 2])
@pytest.mark.parametrize("window", [(-1, -1), (-1, 0), (3, 0)])
def test_attention_by_masks_is_torch_s_own_sample_by_sample(window, groups):
    torch.manual_seed(0)
    lengths, heads, size = [5, 1, 7], 4, 8
    query, key, value = (torch.randn(13, n, size, requires_grad=True) for n in (heads, groups, groups))
    boundaries = torch.tensor([0, 5, 6, 13], dtype=torch.int32)
    parts = []
    for q, k, v in zip(*(x.transpose(0, 1).split(lengths, 1) for x in (query, key, value)), strict=True):
        before = torch.arange(q.shape[1])[:, None] - torch.arange(q.shape[1])
        seen = (before >= 0 if window[1] == 0 else before == before) & (before <= window[0] if window[0] >= 0 else True)
        parts.append(
            torch.nn.functional.scaled_dot_product_attention(q, k, v, attn_mask=seen, scale=0.3, enable_gqa=True)
        )
    expected = torch.cat(parts, 1).transpose(0, 1)
    given = (query, key, value, boundaries, 0.3, window)
    torch.testing.assert_close(attention.attended(*given), expected)
    grad = torch.randn_like(expected)
    wanted = torch.autograd.grad(expected, (query, key, value), grad)
    torch.testing.assert_close(attention._attended_backward(grad, *given), list(wanted))
