"""Compares checksums of the weights of data-parallel replicas, which must be bit-identical.

Replicas compute the same updates from the same reduced gradients. If one differs, its machine had a fault (a flipped bit, a broken link),
and training would average its errors into all others without notice.
"""

from __future__ import annotations

import torch
import torch.distributed as dist
from megatron.core import parallel_state

from megatron_ft.errors import UserError

_WORDS = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}


class ReplicasDiffer(UserError):
    """A rank's weights are not those of its data-parallel replicas."""


def check_replicas(chunks: list, iteration: int) -> None:
    """Raise ReplicasDiffer on every rank if any replica differs, with weight and ranks. All ranks call it."""
    named = [(name, parameter) for chunk in chunks for name, parameter in chunk.named_parameters()]
    mine = torch.stack([_checksum(parameter.detach()) for _, parameter in named])
    group = parallel_state.get_data_parallel_group()
    ranks = dist.get_process_group_ranks(group)
    all_of_them = [torch.empty_like(mine) for _ in ranks]
    dist.all_gather(all_of_them, mine, group=group)
    found = torch.stack(all_of_them)  # [replicas, parameters, 2]
    differs = (found != found.mode(dim=0).values).any(-1)
    odd = [rank for rank, wrong in zip(ranks, differs.any(1).tolist(), strict=True) if wrong]
    odd = ranks if odd and len(ranks) == 2 else odd  # of two replicas it is unknown which one is right
    words = f"{named[int(differs.any(0).nonzero()[0])][0]} on ranks {odd} of {ranks}" if odd else None
    gathered: list = [None] * dist.get_world_size()
    dist.all_gather_object(gathered, words)  # every group has its own replicas; all groups stop together
    if where := [found for found in dict.fromkeys(gathered) if found]:
        raise ReplicasDiffer(
            f"data-parallel replicas differ after iteration {iteration}: {'; '.join(where)}: this is a machine's fault, not the "
            f"data's; resume from the last checkpoint before it, without that machine"
        )


def _checksum(x: torch.Tensor) -> torch.Tensor:
    """Return [2] int64: the sum of x's bits as integers, and the same weighted by position. One flipped bit always changes the first."""
    words = x.contiguous().view(_WORDS[x.element_size()]).flatten().to(torch.int64)
    places = torch.arange(words.numel(), device=x.device) % 65521 + 1
    return torch.stack([words.sum(), (words * places).sum()])
