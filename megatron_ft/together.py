"""What one rank finds, all ranks say: so that none waits in a collective for one that has given up.

Knows nothing of layouts or checkpoints.
"""

from __future__ import annotations

from megatron_ft.errors import CheckpointError, UserError


def raise_together(problem: Exception | None) -> None:
    """All ranks call it. Raises on every rank where any has a problem: the lowest such rank's, in its words.

    A mistake of the user or a refusal of the system is raised as it is everywhere; any other exception (our bug) is raised with its
    traceback where it happened, and named by the others.
    """
    import torch.distributed as dist

    said: list = [None] * dist.get_world_size()
    dist.all_gather_object(said, _portable(problem))
    first = next((rank for rank, found in enumerate(said) if found is not None), None)
    if first is None:
        return
    if isinstance(problem, UserError | OSError) or problem is None:
        found = said[first]
        raise found if isinstance(found, UserError) else RuntimeError(f"rank {first}: {found}") from problem
    raise problem


def _portable(problem: Exception | None) -> UserError | str | None:
    if problem is None or isinstance(problem, UserError):
        return problem
    if isinstance(problem, OSError):
        return refusal(problem)
    return f"{type(problem).__name__}: {problem}"


def refusal(error: OSError) -> CheckpointError:
    """What the system answered about a file of a checkpoint, as a line for the user."""
    where = f"{error.filename}: " if error.filename else ""
    reason = (error.strerror or str(error)).lower()
    return CheckpointError(f"{where}{reason}; free some space or correct the rights, then run the same command again")
