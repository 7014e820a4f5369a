"""What ranks do to test the pretence itself. Module-level functions, so that they travel by name."""

from __future__ import annotations

import os
from collections.abc import Callable

import torch
import torch.distributed as dist
from torch.nn import functional

from tests.gpu_path.pretended import compiling, report
from tests.gpu_path.pretended.tensor import Refused


def _on_gpu(*shape: int) -> torch.Tensor:
    return torch.ones(*shape, device="cuda")


REFUSED: dict[str, Callable] = {
    "a sum over two devices": lambda: _on_gpu(2) + torch.ones(2),
    "a matrix product over two devices": lambda: _on_gpu(2, 2) @ torch.ones(2, 2),
    "values from the host at indices": lambda: _on_gpu(4).index_put_((_indices(),), torch.ones(2)),
    "numpy": lambda: _on_gpu(2).numpy(),
    "another process's GPU": lambda: torch.ones(2, device="cuda:5"),
    "a GPU that is not there": lambda: torch.cuda.set_device(8),
    "a CPU tensor as .data": lambda: setattr(_on_gpu(2), "data", torch.ones(2)),
    "a CPU tensor over nccl": lambda: dist.all_reduce(torch.ones(2)),
    "a pinned GPU tensor": lambda: _on_gpu(2).pin_memory(),
    "random state on the GPU": lambda: torch.cuda.set_rng_state(torch.cuda.get_rng_state().cuda()),
}
WAITS: dict[str, Callable] = {
    "item": lambda: _on_gpu(1).item(),
    "float": lambda: float(_on_gpu(1)),
    "if": lambda: bool(_on_gpu(1) > 0),
    "tolist": lambda: _on_gpu(2).tolist(),
    "cpu": lambda: _on_gpu(2).cpu(),
    "to the device": lambda: torch.ones(2).to("cuda"),
    "cuda": lambda: torch.ones(2).cuda(),
    "torch.tensor on the device": lambda: torch.tensor([1.0], device="cuda"),
    "torch.tensor of GPU scalars": lambda: torch.tensor([_on_gpu(1)[0]]),
    "copy_ to the host": lambda: torch.ones(2).copy_(_on_gpu(2)),
    "nonzero": lambda: _on_gpu(2).nonzero(),
    "a mask as an index": lambda: _on_gpu(2)[_on_gpu(2) > 0],
    "equal": lambda: torch.equal(_on_gpu(2), _on_gpu(2)),
    "an index on the host": lambda: _on_gpu(4)[_indices()],
    "synchronize": torch.cuda.synchronize,
    "an event": lambda: torch.cuda.Event().synchronize(),
}
NO_WAIT: dict[str, Callable] = {
    "arithmetic with a CPU scalar": lambda: _on_gpu(2) * torch.tensor(2.0),
    "non-blocking to the device": lambda: torch.ones(2).pin_memory().to("cuda", non_blocking=True),
    "non-blocking to the host": lambda: _on_gpu(2).to("cpu", non_blocking=True),
    "to where it is": lambda: _on_gpu(2).to("cuda"),
    "another type": lambda: _on_gpu(2).half().type(torch.float32),
    "where": lambda: torch.where(_on_gpu(2) > 0, _on_gpu(2), 0.0),
    "a mask that is filled": lambda: _on_gpu(2).__setitem__(_on_gpu(2) > 0, 0.0),
    "an index on the device": lambda: _on_gpu(4)[torch.arange(2, device="cuda")],
    "attention": lambda: functional.scaled_dot_product_attention(*[_on_gpu(1, 2, 4, 8)] * 3, is_causal=True),
    "a stream that waits": lambda: torch.cuda.current_stream().wait_stream(torch.cuda.Stream()),
}


def _indices() -> torch.Tensor:
    return torch.arange(2)


def refusal(name: str) -> str | None:
    """Return the message with which it is refused; None where it is not."""
    torch.cuda.set_device(0)
    try:
        REFUSED[name]()
    except Refused as error:
        return str(error)
    return None


def waits(name: str) -> int:
    """Return how often the host waited."""
    report.restart()
    (WAITS | NO_WAIT)[name]()
    return report.COUNTS.total()


def where_it_is() -> tuple:
    """Return what Python sees of a tensor on this rank's GPU, and of one that was computed from it."""
    torch.cuda.set_device(int(os.environ["LOCAL_RANK"]))
    found = torch.nn.Linear(2, 2).cuda()(_on_gpu(3, 2))
    return str(found.device), found.is_cuda, found.get_device(), found.type(), str(_on_gpu(1).new_zeros(2).device)


def in_a_fork(how: str) -> str:
    """Return what a forked child says that touches a GPU tensor."""
    tensor = _on_gpu(2)
    ways = {
        "computes": lambda: tensor + 1,
        "reads": tensor.tolist,
        "pickles": lambda: tensor.__reduce_ex__(2),
        "makes": lambda: _on_gpu(2),
        "waits": torch.cuda.synchronize,
    }
    reading, writing = os.pipe()
    child = os.fork()
    if child == 0:
        try:
            ways[how]()
            os.write(writing, b"nothing was refused")
        except Refused as error:
            os.write(writing, str(error).encode())
        os._exit(0)
    os.waitpid(child, 0)
    return os.read(reading, 1000).decode()


def exchanged(posted: str) -> list[float]:
    """Two ranks that are each other's next and previous stage. Return what arrived (from the previous, from the next)."""
    rank = dist.get_rank()
    torch.cuda.set_device(rank)
    other = 1 - rank
    to_next, to_previous = _on_gpu(1) * (10 * rank + 1), _on_gpu(1) * (10 * rank + 2)
    from_previous, from_next = torch.zeros(1, device="cuda"), torch.zeros(1, device="cuda")
    operations = {
        "send previous": dist.P2POp(dist.isend, to_previous, other, tag=2),
        "receive previous": dist.P2POp(dist.irecv, from_previous, other, tag=1),
        "send next": dist.P2POp(dist.isend, to_next, other, tag=1),
        "receive next": dist.P2POp(dist.irecv, from_next, other, tag=2),
    }
    orders = {
        "previous first on both": list(operations),
        "matched": list(operations) if rank else ["send next", "receive next", "send previous", "receive previous"],
    }
    for work in dist.batch_isend_irecv([operations[name] for name in orders[posted]]):
        work.wait()
    return [float(from_previous), float(from_next)]


def random_streams() -> tuple[bool, bool]:
    """Return whether the GPU's dropout leaves the host's stream alone, and whether its own state brings its masks back."""
    torch.manual_seed(1)
    host, state = torch.get_rng_state(), torch.cuda.get_rng_state()
    first = functional.dropout(_on_gpu(64), 0.5)
    torch.cuda.set_rng_state(state)
    again = functional.dropout(_on_gpu(64), 0.5)
    return bool((torch.get_rng_state() == host).all()), torch.equal(first, again)


@torch.compile
def _whole(x: torch.Tensor, n: int) -> torch.Tensor:
    return (x * n).sin()


@torch.compile(dynamic=False)
def _specialised(x: torch.Tensor, n: int) -> torch.Tensor:
    return (x * n).sin()


@torch.compile
def _broken(x: torch.Tensor, n: int) -> torch.Tensor:
    return x.sin() if x.sum().item() > n else x.cos()


def traced(name: str) -> tuple[int, int, str | None]:
    """Call a compiled function with four numbers. Return calls, graphs, and what Dynamo had against it."""
    compiling.trace("eager")
    function = {"whole": _whole, "specialised": _specialised, "broken": _broken}[name]
    for number in (2, 3, 4, 5):
        function(_on_gpu(4), number)
    whole_name = f"{__name__}._{name}"
    found = compiling.CALLS[whole_name], compiling.GRAPHS[whole_name], compiling.FAILED.get(whole_name)
    compiling.trace(None)
    return found
