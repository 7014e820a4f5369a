"""The loss over a shared vocabulary: torch's own numbers, the engine's to the bit, and no copy of the logits in fp32."""

import numpy as np
import pytest


@pytest.mark.parametrize("vocab_size", [512, 203, 100])
def test_loss_and_gradient_are_torchs(vocab_size, four_ranks):
    """Four ranks of 128 columns each; with 203 the third and with 100 all but the first hold nothing that counts."""
    results = four_ranks.run(shared_vocabulary, vocab_size)
    for losses, gradient, expected, wanted in results:
        np.testing.assert_allclose(losses, expected, rtol=1e-6, atol=1e-6)
        np.testing.assert_allclose(gradient, wanted, rtol=1e-5, atol=1e-8)


def shared_vocabulary(vocab_size):
    """Return (loss, this rank's gradient) of ours in pieces of 3 positions, and of torch on the whole vocabulary."""
    import torch
    import torch.distributed as dist

    from megatron_ft.models import cross_entropy

    torch.manual_seed(0)
    s, b, width, rank = 5, 2, 128, dist.get_rank()
    whole = (torch.randn(s, b, 4 * width) * 4).requires_grad_()
    labels, weights = torch.randint(0, vocab_size, (s, b)), torch.rand(s, b)
    mine = whole.detach()[..., rank * width : (rank + 1) * width].clone().requires_grad_()
    cross_entropy.CHUNK, kept = 3 * 4 * width, cross_entropy.CHUNK
    losses = cross_entropy.vocab_parallel_cross_entropy(mine, labels, vocab_size, dist.group.WORLD)
    (losses * weights).sum().backward()
    cross_entropy.CHUNK = kept
    real = whole[..., :vocab_size].permute(0, 2, 1)
    expected = torch.nn.functional.cross_entropy(real, labels, reduction="none")
    (expected * weights).sum().backward()
    wanted = whole.grad[..., rank * width : (rank + 1) * width]
    return losses.detach().numpy(), mine.grad.numpy(), expected.detach().numpy(), wanted.numpy()


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16"])
def test_it_is_the_engines_to_the_bit(dtype, one_rank):
    for ours, theirs in one_rank.run(ours_and_the_engines, dtype)[0]:
        np.testing.assert_array_equal(ours, theirs)


def ours_and_the_engines(dtype):
    """Return (ours, the engine's unfused) loss and gradient, with padding columns that the engine is given as -inf."""
    import torch
    from megatron.core import tensor_parallel

    from megatron_ft.engine.parallel import process_groups
    from megatron_ft.models.cross_entropy import vocab_parallel_cross_entropy

    with process_groups() as _:
        from megatron.core import parallel_state

        torch.manual_seed(0)
        logits = (torch.randn(7, 2, 256) * 3).to(getattr(torch, dtype))
        labels, weights = torch.randint(0, 203, (7, 2)), torch.rand(7, 2)
        found = []
        for which in ("ours", "engine"):
            own = logits.clone().requires_grad_()
            if which == "ours":
                group = parallel_state.get_tensor_model_parallel_group()
                losses = vocab_parallel_cross_entropy(own, labels, 203, group)
            else:
                masked = own + torch.where(torch.arange(256) < 203, 0.0, float("-inf")).to(own.dtype)
                losses = tensor_parallel.vocab_parallel_cross_entropy(masked, labels)
            (losses * weights).sum().backward()
            found.append([losses.detach().numpy(), own.grad.float().numpy()])
    return list(zip(*found, strict=True))


def test_compiled_it_is_the_same_without_recompiling(one_rank):
    """Compiled for this CPU; the kernels for a GPU come from the same graphs."""
    apart, graphs, breaks = one_rank.run(compiled_or_not)[0]
    assert apart < 1e-6 and graphs == 3 and not breaks


def compiled_or_not():
    """Return the largest difference of loss and gradient over three shapes, and Dynamo's counts of graphs and breaks."""
    import torch
    import torch.distributed as dist
    from torch._dynamo.utils import counters

    from megatron_ft.models.cross_entropy import vocab_parallel_cross_entropy

    counters.clear()
    apart = 0.0
    for s in (6, 9, 12):
        torch.manual_seed(s)
        logits, labels = torch.randn(s, 2, 256), torch.randint(0, 203, (s, 2))
        found = []
        for fused in (False, True):
            own = logits.clone().requires_grad_()
            losses = vocab_parallel_cross_entropy(own, labels, 203, dist.group.WORLD, fused)
            losses.mean().backward()
            found.append((losses.detach(), own.grad * s))
        apart = max(apart, *(float((a - b).abs().max()) for a, b in zip(*found, strict=True)))
    return apart, counters["stats"]["unique_graphs"], dict(counters["graph_break"])


def test_the_logits_are_never_copied_in_fp32(one_rank):
    """Beside the gradient, which has the logits' type, nothing is as large as the logits."""
    largest = one_rank.run(largest_tensor)[0]
    assert largest == {"float32": 3 * 4 * 256, "bfloat16": 40 * 256 * 2}


def largest_tensor():
    """Return the bytes of the largest tensor that is made, by type, of 40 positions in pieces of 3."""
    import torch
    import torch.distributed as dist
    from torch.utils._python_dispatch import TorchDispatchMode

    from megatron_ft.models import cross_entropy

    class Largest(TorchDispatchMode):
        def __init__(self):
            super().__init__()
            self.found: dict[str, int] = {}

        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            out = func(*args, **(kwargs or {}))
            for x in out if isinstance(out, tuple) else (out,):
                if isinstance(x, torch.Tensor) and x.is_floating_point() and x._base is None:
                    name = str(x.dtype).removeprefix("torch.")
                    self.found[name] = max(self.found.get(name, 0), x.untyped_storage().nbytes())
            return out

    logits = torch.randn(20, 2, 256).bfloat16().requires_grad_()
    labels = torch.randint(0, 203, (20, 2))
    cross_entropy.CHUNK, kept = 3 * 4 * 256, cross_entropy.CHUNK
    with Largest() as watch:
        cross_entropy.vocab_parallel_cross_entropy(logits, labels, 203, dist.group.WORLD).sum().backward()
    cross_entropy.CHUNK = kept
    return watch.found
