"""Which checkpoint a run begins from: the newest that can be believed, and loudly the one before where it cannot.

The first choice is made without torch, before the processes wait for each other; the content of files is verified later, by all ranks.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence
from pathlib import Path

from megatron_ft.checkpoints.folder import (
    CONFIG,
    SETTINGS,
    TRACKER,
    CheckpointConfig,
    describe,
    find_checkpoint,
    iterations_in,
)
from megatron_ft.config.sections import Checkpointing
from megatron_ft.digests import check_digests, has_digests
from megatron_ft.engine.collective_errors import raise_together
from megatron_ft.engine.parallel import Layout
from megatron_ft.errors import CheckpointError, PassingFault, UserError
from megatron_ft.log import logger
from megatron_ft.models.architecture import Architecture

log = logger("checkpoint")


def sources(checkpointing: Checkpointing, loudly: bool = True) -> tuple[list[Path], Checkpointing]:
    """(the checkpoints to try, newest first, the section as it then stands): with --auto_resume those in --save, if there are any.

    Raise CheckpointError where --save already holds another run's checkpoints, or is one.
    """
    save = Path(checkpointing.save) if checkpointing.save else None
    if save is not None and (save / CONFIG).is_file():
        raise CheckpointError(
            f"--save {save} is itself a checkpoint, or a model: give the folder that checkpoints are to be written into, or a new one"
        )
    used = save if save is not None and _in_use(save) else None
    if checkpointing.auto_resume and used:
        return candidates(used, loudly), dataclasses.replace(checkpointing, finetune=False)
    found = candidates(Path(checkpointing.load), loudly)
    if used and (checkpointing.finetune or used.resolve() not in found[0].resolve().parents):
        raise CheckpointError(
            f"--save {checkpointing.save} holds the checkpoints of an earlier run: go on with that one (--auto_resume), "
            f"or give this one a folder of its own"
        )
    return found, checkpointing


def _in_use(root: Path) -> bool:
    return (root / TRACKER).is_file() or bool(iterations_in(root))


def candidates(root: Path, loudly: bool = True) -> list[Path]:
    """The checkpoints of a root that may be loaded: the tracker's, then older ones. A tracker that says nothing is made up for.

    root may be a single checkpoint, which is then the only one. Raise CheckpointError where there is none.
    """
    if (root / CONFIG).is_file() and not (root / TRACKER).exists():
        return [root]
    numbers = iterations_in(root) if root.is_dir() else {}
    try:
        tracked = find_checkpoint(root)
    except CheckpointError as error:
        if not numbers:
            raise
        if loudly:
            log.warning(f"{error}; the newest that is whole is taken")
        return [root / numbers[n] for n in sorted(numbers, reverse=True)]
    if tracked.name not in numbers.values():
        return [tracked]
    newest = next(n for n, name in numbers.items() if name == tracked.name)
    return [root / numbers[n] for n in sorted(numbers, reverse=True) if n <= newest]


def first_whole(
    folders: Sequence[Path], read: Callable[[Path], CheckpointConfig], checkpointing: Checkpointing
) -> tuple[int, CheckpointConfig]:
    """(index, description) of the first checkpoint with all its files. Raise the first one's CheckpointError if none has.

    read: what describes a checkpoint, with the rules that the run has about it.
    """
    refusals: list[UserError] = []
    origin = _origin(checkpointing, folders)
    for index, folder in enumerate(folders):
        try:
            if checkpointing.verify_checkpoint and has_digests(folder):
                check_digests(folder, only=(CONFIG, SETTINGS))  # before they are read: damaged, they may say anything
            own = describe(folder).architecture
            if origin and _sizes(own) != _sizes(origin):
                raise CheckpointError(
                    f"{folder} is a checkpoint of another model than --load {checkpointing.load}; remove it"
                )
        except UserError as error:
            refuse(error, folders[index + 1 :])
            refusals.append(error)
            continue
        return index, read(folder)
    raise refusals[0]


def _origin(checkpointing: Checkpointing, folders: Sequence[Path]) -> Architecture | None:
    """The model of --load, where a run goes on from --save and --load is still there to compare with."""
    try:
        source = find_checkpoint(Path(checkpointing.load))
        return describe(source).architecture if source.resolve().parent != folders[0].resolve().parent else None
    except UserError:
        return None


def _sizes(arch: Architecture) -> dict:
    """Return what cannot differ between a model and itself trained further. Positions and rope can, by flags."""
    changing = ("hf", "rope_scaling", "rope_theta", "max_position_embeddings")
    return {name: value for name, value in arch.to_dict().items() if name not in changing}


def agree(folders: Sequence[Path], first: int, asked: Checkpointing, layout: Layout) -> None:
    """All ranks call it, once nobody else can save any more. Raise PassingFault on all unless all mean to begin from the same
    checkpoints, and these are what lies there now.

    folders: this rank's candidates; the first of them that it can use. asked: the section as the user gave it. Each process looks
    for itself before the processes know of each other: a job that saves meanwhile, or a disk that errs on one machine, would make one
    of halves of two checkpoints.
    """
    import torch.distributed as dist

    problem = None
    everyone: list = [None] * layout.world_size
    dist.all_gather_object(everyone, [str(folder) for folder in folders[first:]])
    unlike = next((rank for rank, theirs in enumerate(everyone) if theirs != everyone[0]), None)
    try:
        if unlike is not None:
            raise PassingFault(
                f"rank 0 would begin from {everyone[0][0]} and rank {unlike} from {everyone[unlike][0]}: another job saved meanwhile, or "
                f"a disk is not the same on every machine; start again"
            )
        if layout.is_main and (now := sources(asked, loudly=False)[0]) != list(folders):
            raise PassingFault(f"{now[0].parent} was changed by another job while this one started; start again")
    except UserError as error:
        problem = error
    raise_together(problem)


def first_trusted(
    folders: Sequence[Path], described: CheckpointConfig, read: Callable[[Path], CheckpointConfig],
    layout: Layout, digests: bool,
) -> tuple[Path, CheckpointConfig]:  # fmt: skip
    """(folder, description) of the first checkpoint whose files are what was written; all ranks call it. described: the first's.

    Raise the first one's CheckpointError if there is none; a checkpoint of another model is none.
    """
    from megatron_ft.checkpoints.verify import verify

    refusals: list[UserError] = []
    for index, folder in enumerate(folders):
        try:
            own = described if index == 0 else read(folder)
            if _sizes(own.architecture) != _sizes(described.architecture):
                raise CheckpointError(f"{folder} is a checkpoint of another model than the others beside it; remove it")
            verify(folder, own, layout, digests)
        except UserError as error:
            refuse(error, folders[index + 1 :])
            refusals.append(error)
            continue
        return folder, dataclasses.replace(own, chat_format=described.chat_format)
    raise refusals[0]


def refuse(error: UserError, older: Sequence[Path]) -> None:
    """Say loudly why a checkpoint is not used, and which one is tried instead; where there is none the error itself speaks."""
    if older:
        log.warning(f"CHECKPOINT NOT USED: {error}")
        log.warning(f"falling back to the checkpoint before: {older[0]}")
