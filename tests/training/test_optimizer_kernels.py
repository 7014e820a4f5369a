"""What the engine is given in place of apex: the same numbers as its own stand-ins, and as torch's AdamW, for all tensors at once."""

import numpy as np
import pytest


def test_norm_scale_and_copy_are_the_engines_to_the_bit(one_rank):
    for ours, theirs in one_rank.run(both_ways)[0]:
        np.testing.assert_array_equal(ours, theirs)


def both_ways():
    """Return (ours, the engine's) of each operation."""
    import torch
    from megatron.core import utils

    from megatron_ft.engine import optimizer

    torch.manual_seed(0)
    tensors = [torch.randn(shape) * 10.0 ** (i - 2) for i, shape in enumerate([(7, 5), (33,), (4, 4, 3), (1,)])]
    pairs = [
        (
            optimizer.norm_of_all(1, None, [tensors], False)[0],
            utils.local_multi_tensor_l2_norm(1, None, [tensors], False)[0],
        )
    ]
    for target_type in (torch.float32, torch.float16, torch.bfloat16):
        for scale in (1.0, 0.37):
            results = []
            for operation in (optimizer.scale_all, utils.local_multi_tensor_scale):
                target = [torch.zeros_like(x, dtype=target_type) for x in tensors]
                operation(1, None, [tensors, target], scale)
                results.append(torch.cat([x.flatten().float() for x in target]))
            pairs.append(tuple(results))
    in_place = []
    for operation in (optimizer.scale_all, utils.local_multi_tensor_scale):
        mine = [x.clone() for x in tensors]
        operation(1, None, [mine, mine], 0.37)
        in_place.append(torch.cat([x.flatten() for x in mine]))
    return [(a.numpy(), b.numpy()) for a, b in [*pairs, tuple(in_place)]]


@pytest.mark.parametrize("weight_decay", [0.0, 0.1])
def test_adam_is_torchs_to_the_bit(weight_decay, one_rank):
    ours, theirs = one_rank.run(adams, weight_decay)[0]
    np.testing.assert_array_equal(ours, theirs)


def adams(weight_decay):
    """Return the parameters after five steps of our FusedAdam, and of torch's AdamW."""
    import torch

    from megatron_ft.engine.optimizer import FusedAdam

    results = []
    for make in (FusedAdam, lambda params, **options: torch.optim.AdamW(params, fused=True, **options)):
        torch.manual_seed(0)
        params = [torch.nn.Parameter(torch.randn(shape)) for shape in [(7, 5), (33,)]]
        adam = make(params, lr=1e-2, weight_decay=weight_decay)
        for _ in range(5):
            for p in params:
                p.grad = torch.randn_like(p)
            adam.step()
        results.append(torch.cat([p.detach().flatten() for p in params]).numpy())
    return results
