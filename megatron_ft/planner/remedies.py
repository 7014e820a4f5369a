"""What would make a job fit for which no layout does: each remedy is found by a search, the smallest that is enough."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace

from megatron_ft.adapters.spec import from_settings
from megatron_ft.config.sections import Adapters
from megatron_ft.models.architecture import Architecture
from megatron_ft.models.pipeline import plain_split
from megatron_ft.planner.known import GPUS
from megatron_ft.planner.memory import Job
from megatron_ft.planner.search import least_memory

MOST_GPUS = 16_384
SHORTEST, STEP = 256, 256
"""Row lengths that are tried: multiples of STEP."""
RANK = 16
"""Of the adapters that are tried."""


@dataclass(frozen=True)
class Remedy:
    """flags: of plan, in place of what was given. words: what they mean. memory: then needed on the fullest GPU, in bytes."""

    flags: str
    words: str
    memory: int
    is_small: bool = False
    """Training stays as it is, with at most twice the GPUs or rows of at least half the length."""


def remedies(
    arch: Architecture, job: Job, memory: float, gpus_per_node: int, *, more: bool = True, other: bool = True
) -> list[Remedy]:
    """Return what would fit, the smallest change first: up to twice the GPUs, rows of half the length or more, adapters, then more of each.

    memory: bytes of a GPU. more: there may be more GPUs. other: there may be GPUs of another kind.
    """
    gpus = _more_gpus(arch, job, memory, gpus_per_node) if more else None
    rows = _shorter_rows(arch, job, memory, gpus_per_node)
    both = [one for one in (gpus, rows) if one]
    adapters = _adapters(arch, job, memory, gpus_per_node)
    found = [one for one in both if one.is_small] + adapters + [one for one in both if not one.is_small]
    return found + (_larger_gpus(arch, job, memory, gpus_per_node) if other else [])


def _need(arch: Architecture, job: Job, gpus_per_node: int) -> float:
    found = least_memory(arch, job, gpus_per_node)
    return found[0] if found else float("inf")


def _more_gpus(arch: Architecture, job: Job, memory: float, gpus_per_node: int) -> Remedy | None:
    for count in _counts(job.gpus, gpus_per_node):
        need = _need(arch, replace(job, tp=1, cp=1, dp=count, split=plain_split(arch.num_layers, 1)), gpus_per_node)
        if need <= memory:
            return Remedy(f"--gpus {count}", f"{count} GPUs", int(need), count <= 2 * job.gpus)
    return None


def _counts(gpus: int, gpus_per_node: int) -> Iterator[int]:
    """Yield the next numbers of GPUs: each within a node, then whole nodes, then ever larger steps."""
    yield from range(gpus + 1, gpus_per_node + 1)
    nodes = gpus // gpus_per_node + 1
    while nodes * gpus_per_node <= MOST_GPUS:
        if nodes > 1 or gpus_per_node > gpus:
            yield nodes * gpus_per_node
        nodes += 1 if nodes < 16 else nodes // 16


def _shorter_rows(arch: Architecture, job: Job, memory: float, gpus_per_node: int) -> Remedy | None:
    """Return the longest rows that fit; memory falls with the length."""
    low, high = SHORTEST // STEP, -(-job.seq_length // STEP)

    def need(steps: int) -> float:
        return _need(arch, replace(job, seq_length=steps * STEP), gpus_per_node)

    if low >= high or need(low) > memory:
        return None
    while high - low > 1:
        middle = (low + high) // 2
        low, high = (middle, high) if need(middle) <= memory else (low, middle)
    length = low * STEP
    is_small = 2 * length >= job.seq_length
    return Remedy(f"--seq_length {length}", f"rows of {length:,} tokens", int(need(low)), is_small)


def _adapters(arch: Architecture, job: Job, memory: float, gpus_per_node: int) -> list[Remedy]:
    """Return adapters in place of training the model, and the base in 4 bits, the first that is enough."""
    tried = []
    if not job.lora:
        job = replace(job, lora=from_settings(Adapters(RANK), arch))
        tried.append((job, [f"--lora_rank {RANK}"], "adapters"))
    if not job.nf4:
        flags = tried[0][1] if tried else []
        words = "adapters on a base in 4 bits" if tried else "a base in 4 bits"
        tried.append((replace(job, nf4=True), [*flags, "--base_precision nf4"], words))
    for one, flags, words in tried:
        if (need := _need(arch, one, gpus_per_node)) <= memory:
            return [Remedy(" ".join(flags), words, int(need))]
    return []


def _larger_gpus(arch: Architecture, job: Job, memory: float, gpus_per_node: int) -> list[Remedy]:
    need = _need(arch, job, gpus_per_node)
    enough = {name: gpu.memory for name, gpu in GPUS.items() if memory < gpu.memory * 1e9 >= need}
    if not enough:
        return []
    name = min(enough, key=lambda one: enough[one])
    return [Remedy(f"--gpu {name}", f"GPUs of {enough[name]:.0f} GB", int(need))]
