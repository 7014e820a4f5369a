"""Check of the communication between processes of this machine: a sum over all GPUs, or over two CPU processes."""

from __future__ import annotations

import time
from pathlib import Path

from megatron_ft import device, gpu_facts
from megatron_ft.doctor.ranks import run_on_ranks
from megatron_ft.doctor.result import Found, failed, passed
from megatron_ft.files import read_json, write_json

FOUND = "communication.json"
NUMBERS = 1 << 22
"""Number of fp32 values: 16 MiB."""
ROUNDS = 5


def communication(folder: Path) -> Found:
    processes = len(gpu_facts.gpus()) or 2
    ended = run_on_ranks("several:sum_on_ranks", folder, processes, 90)
    what = f"{gpu_facts.backend_version()}, {processes} process{'es' if processes > 1 else ''}"
    if ended.code != 0:
        return failed(f"{what}: {ended.reason}")
    found = read_json(folder / FOUND)
    if found["wrong"]:
        return failed(f"{what}: the sum of {processes} tensors is wrong by {found['wrong']:g}; try NCCL_P2P_DISABLE=1")
    return passed(f"{what}; a sum of 16 MiB takes {found['seconds'] * 1e3:.1f} ms")


def sum_on_ranks(folder: Path) -> None:
    """Sum a tensor of this rank's number over all ranks. Rank 0 writes the time and the largest error of any rank."""
    import torch
    import torch.distributed as dist

    rank, size = dist.get_rank(), dist.get_world_size()
    for round_ in range(ROUNDS + 1):
        numbers = torch.full((NUMBERS,), rank + 1.0, device=device.current_device())
        device.synchronize()
        if round_ < 2:  # the first one opens the connections
            began = time.perf_counter()
        dist.all_reduce(numbers)
        device.synchronize()
    seconds = (time.perf_counter() - began) / ROUNDS
    wrong = (numbers - size * (size + 1) / 2).abs().max()
    dist.all_reduce(wrong, op=dist.ReduceOp.MAX)
    if rank == 0:
        write_json(folder / FOUND, {"seconds": seconds, "wrong": float(wrong)})
