"""A GPU that is not there: tensors that say cuda and keep their numbers in host memory.

`install` makes torch pretend. Then has_gpu() is True, megatron-core runs without the CPU stand-in, and every branch that only GPUs
take is walked with true numbers, on any machine.

What it proves: arguments and signatures; that devices do not mix; that groups of nccl get GPU tensors only; order and matching of
messages between stages; numbers equal to the CPU backend's; state on its way into checkpoints, and that a forked writer leaves the
GPU alone; how often, and where, the host waits for the device; what torch.compile makes of what is compiled (one graph, no more).

What it cannot prove: anything inside a kernel (which one is taken, its rounding, its speed), streams and races (everything has run
as soon as it is started, so overlap is only walked through), memory, NCCL itself (its algorithms, its time-outs, a receive that
waits behind a send on one stream), and Triton's compilation. Each process is bound to one GPU, and a tensor of another is refused.

FakeTensorMode with fake cuda tensors does not do: a CPU build of torch aborts in autograd, which looks for the device's guard, and
a CUDA build without a driver refuses in the engine. So C++ is told cpu, and Python cuda.
"""

from __future__ import annotations


def install(count: int = 8) -> None:
    """Pretend `count` GPUs in this process and those it forks, for good. Call before megatron.core is imported."""
    import torch._dynamo  # keeps tables of torch.cuda's functions: before any of them is replaced
    import torch.nn.attention.varlen  # noqa: F401  (defines operations with torch's own functions)

    from tests.gpu_path.pretended import attention, compiling, copies, cuda, dispatch, groups

    cuda.install(count)
    compiling.install()
    attention.install()
    copies.install()
    groups.install()
    dispatch.install()
