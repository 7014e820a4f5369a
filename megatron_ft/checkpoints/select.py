"""Selects the checkpoint from which a run begins: the newest that is verified; if it is damaged, a warning and the one before.

The first selection is made without torch, before the processes wait for each other. Later all ranks verify the content of the files.
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
    """Return (the checkpoints to try, newest first; the section, changed if needed). With --auto_resume those in --save, if any.

    Raise CheckpointError if --save already contains the checkpoints of another run, or is one.
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
            f"--save {checkpointing.save} holds the checkpoints of an earlier run: continue that run (--auto_resume), "
            f"or choose another folder"
        )
    return found, checkpointing


def _in_use(root: Path) -> bool:
    return (root / TRACKER).is_file() or bool(iterations_in(root))


def candidates(root: Path, loudly: bool = True) -> list[Path]:
    """Return the checkpoints of a root that may be loaded: that of the tracker, then older ones; without a valid tracker the newest first.

    root may be a single checkpoint, which is then the only one. Raise CheckpointError if there is none.
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
            log.warning(f"{error}; the newest complete one is used")
        return [root / numbers[n] for n in sorted(numbers, reverse=True)]
    if tracked.name not in numbers.values():
        return [tracked]
    newest = next(n for n, name in numbers.items() if name == tracked.name)
    return [root / numbers[n] for n in sorted(numbers, reverse=True) if n <= newest]


def first_whole(
    folders: Sequence[Path], read: Callable[[Path], CheckpointConfig], checkpointing: Checkpointing
) -> tuple[int, CheckpointConfig]:
    """Return (index, description) of the first checkpoint with all its files. Raise the CheckpointError of the first one if there is none.

    read: returns the description of a checkpoint after checking the rules of the run.
    """
    refusals: list[UserError] = []
    origin = _origin(checkpointing, folders)
    for index, folder in enumerate(folders):
        try:
            if checkpointing.verify_checkpoint and has_digests(folder):
                # Before they are read, because a damaged one may contain anything.
                check_digests(folder, only=(CONFIG, SETTINGS))
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
    """Return the model of --load, to compare with, if a run continues from --save and --load still exists."""
    try:
        source = find_checkpoint(Path(checkpointing.load))
        return describe(source).architecture if source.resolve().parent != folders[0].resolve().parent else None
    except UserError:
        return None


def same_sizes(one: Architecture, other: Architecture) -> bool:
    """Return whether two models differ at most in what a run may change by flags."""
    return _sizes(one) == _sizes(other)


def _sizes(arch: Architecture) -> dict:
    """Return what cannot differ between a model and itself trained further. Positions and rope can, by flags."""
    changing = ("hf", "rope_scaling", "rope_theta", "max_position_embeddings")
    return {name: value for name, value in arch.to_dict().items() if name not in changing}


def agree(folders: Sequence[Path], first: int, asked: Checkpointing, layout: Layout) -> None:
    """Raise PassingFault on all ranks unless all begin from the same checkpoints, and these still exist. All ranks call it, after no other
    job can save.

    folders: this rank's candidates. first: index of the first one that it can use. asked: the section as the user gave it. Each process
    has looked for candidates before the processes were connected. If another job saved meanwhile, or if a disk failed on one machine, the
    ranks would load parts of two checkpoints.
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
    """Return (folder, description) of the first checkpoint whose files match their digests. All ranks call it. described: of the first
    one.

    Raise the CheckpointError of the first one if there is none. A checkpoint of another model does not count.
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
    """Log why a checkpoint is not used and which one is tried instead. Raise the error if there is no other."""
    if older:
        log.warning(f"CHECKPOINT NOT USED: {error}")
        log.warning(f"falling back to the checkpoint before: {older[0]}")
