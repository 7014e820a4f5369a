"""Raises an error of one rank on all ranks, so that none waits in a collective call for a rank that has failed."""

from __future__ import annotations

import errno

from megatron_ft.errors import CheckpointError, PassingFault, UserError

_USERS = {errno.ENOSPC, errno.EDQUOT, errno.EROFS, errno.EACCES, errno.EPERM, errno.EFBIG, errno.ENOTDIR, errno.EISDIR,
          errno.ENAMETOOLONG, errno.ELOOP}  # fmt: skip
"""What only the user can put right. Whatever else a disk answers (EIO, ESTALE, ETIMEDOUT, ...) may pass."""


def raise_together(problem: Exception | None) -> None:
    """Raise on every rank if any rank has a problem: that of the lowest such rank. All ranks call it.

    A UserError or an OSError is raised with the same message on every rank. Any other exception, which is a bug, is raised with its
    traceback where it happened; the other ranks name it.
    """
    import torch.distributed as dist

    gathered: list = [None] * dist.get_world_size()
    dist.all_gather_object(gathered, _portable(problem))
    first = next((rank for rank, found in enumerate(gathered) if found is not None), None)
    if first is None:
        return
    if isinstance(problem, UserError | OSError) or problem is None:
        found = gathered[first]
        raise found if isinstance(found, UserError) else RuntimeError(f"rank {first}: {found}") from problem
    raise problem


def _portable(problem: Exception | None) -> UserError | str | None:
    if problem is None or isinstance(problem, UserError):
        return problem
    if isinstance(problem, OSError):
        return refusal(problem)
    return f"{type(problem).__name__}: {problem}".removesuffix(": ")  # a MemoryError has no text


def refusal(error: OSError) -> CheckpointError:
    """Return what the system answered about a file of a checkpoint, as a line for the user."""
    where = f"{error.filename}: " if error.filename else ""
    reason = (error.strerror or str(error)).lower()
    if error.errno in _USERS:
        return CheckpointError(
            f"{where}{reason}; free some space or correct the rights, then run the same command again"
        )
    return PassingFault(
        f"{where}{reason}; earlier checkpoints are complete: run the same command again; if the error remains, check the disk"
    )
