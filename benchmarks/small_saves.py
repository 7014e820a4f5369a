"""A run that does nothing but save: the real protocol and the engine's real format, with a few small tensors for a model.

What campaigns on saves share: forked in milliseconds, it saves ten and more times a second, and what a checkpoint has to hold follows
from its number, so that a reader can tell to the bit whether it is whole.
"""

# ruff: noqa: E402
from __future__ import annotations

import dataclasses
import sys
from functools import partial
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from megatron_ft.engine.start import prepare_engine

prepare_engine()  # before anything imports the engine, hence the imports below it

from megatron.core.dist_checkpointing import ShardedTensor

from megatron_ft.checkpoints.folder import CONFIG, CheckpointConfig, describe, write_config
from megatron_ft.checkpoints.lock import FolderLock
from megatron_ft.checkpoints.restricted import file_slice
from megatron_ft.checkpoints.saver import Keep, Saver
from megatron_ft.checkpoints.select import candidates
from megatron_ft.checkpoints.training_state import Progress, plan_sharded
from megatron_ft.checkpoints.verify import read_description
from megatron_ft.digests import check_digests
from megatron_ft.engine.parallel import Layout
from megatron_ft.models.architecture import Architecture

SHAPES = {"weight": (64, 64), "moment": (64, 64), "bias": (17,), "one": (1,)}
ARCHITECTURE = Architecture(
    family="llama", num_layers=1, hidden_size=8, ffn_hidden_size=8, num_attention_heads=1, num_query_groups=1,
    head_dim=8, vocab_size=100, max_position_embeddings=256, norm_epsilon=1e-5,
)  # fmt: skip


def layout(rank: int = 0, ranks: int = 1) -> Layout:
    return Layout(1, 1, ranks, 0, 0, rank, False, rank)


def join(rank: int = 0, ranks: int = 1, store: str | None = None) -> None:
    """This process's group; alone without a store."""
    made = torch.distributed.FileStore(store, ranks) if store else torch.distributed.HashStore()
    torch.distributed.init_process_group("gloo", store=made, rank=rank, world_size=ranks)


def tensors(iteration: int) -> dict[str, torch.Tensor]:
    """What the checkpoint of an iteration holds."""
    generator = torch.Generator().manual_seed(iteration)
    return {name: torch.randn(shape, generator=generator) for name, shape in SHAPES.items()}


def save_on(root: Path, here: Layout, asynchronous: bool, keep: int | None, first: int, under_way=lambda: None):
    """Saves `first`, `first` + 1, ... for ever; yields the numbers that are committed. under_way: called before each save."""
    with FolderLock(root, here), Saver(root, here, partial(_plan, here), asynchronous, Keep(keep)) as saver:
        iteration = first
        while True:
            under_way()
            for saved in saver.save(Progress(iteration, iteration)):
                yield saved.iteration
            iteration += 1


def save_some(root: Path, here: Layout, asynchronous: bool, keep: int | None, first: int, saves: int) -> None:
    """Saves `first` and those after it, and ends as a run ends: nothing stays in the background."""
    with FolderLock(root, here), Saver(root, here, partial(_plan, here), asynchronous, Keep(keep)) as saver:
        for iteration in range(first, first + saves):
            saver.save(Progress(iteration, iteration))
        saver.committed(wait=True)


def _plan(here: Layout, folder: Path, progress: Progress):
    rows = ((0, here.rank, here.world_size),)
    state = {
        "model": {
            name: ShardedTensor.from_rank_offsets(
                name, value[None].contiguous(), *rows, replica_id=0, prepend_axis_num=0
            )
            for name, value in tensors(progress.iteration).items()
        },
        "progress": dataclasses.asdict(progress),
    }
    config = CheckpointConfig(ARCHITECTURE, "torch_dist", 1, 1, 128, progress.iteration, "fp32", digested=True)
    put = {CONFIG: lambda path: write_config(path.parent, config)} if here.is_main else {}
    return plan_sharded(state, put, folder, here.is_main)


def newest(root: Path) -> tuple[int, int]:
    """(iteration, how many were passed over) of the newest checkpoint that is whole to the bit; -1 where there is none."""
    for passed, folder in enumerate(candidates(root)):
        try:
            return check(folder), passed
        except Exception as error:
            print(f"  {folder.name}: {error}", flush=True)
    return -1, 0


def check(folder: Path) -> int:
    """The iteration of a checkpoint. Raises whatever is wrong with it."""
    described = describe(folder)
    check_digests(folder)
    (metadata, common), iteration = read_description(folder), described.iteration
    assert common["progress"]["iteration"] == iteration
    wanted = tensors(iteration)
    seen = set()
    for index, place in metadata.storage_data.items():
        found = torch.load(file_slice(folder / place.relative_path, place.offset, place.length), weights_only=True)
        assert torch.equal(found[0], wanted[index.fqn]), f"{index.fqn} is not that of {iteration}"
        seen.add(index.fqn)
    assert seen == set(wanted), f"only {seen}"
    return iteration
