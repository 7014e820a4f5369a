"""What a rank is asked to do in these tests. Module-level functions, so that they travel to it by name."""

import importlib
from collections.abc import Callable

from megatron_ft.engine.versions import installed, patch, release
from megatron_ft.errors import EngineError


def changes() -> dict[str, tuple[Callable, tuple[str, ...]]]:
    """Everything that changes the engine's inside: name -> what makes the change, the parts that it needs."""
    from megatron_ft.engine import cpu_stand_in, optimizer, patches
    from megatron_ft.models import rotary

    functions = [
        *(patches.pass_write_results_in_process, patches.remove_writer_warning),
        *(patches.recompute_norms_without_fp8, patches.read_objects_with_restrictions),
        *(patches.choose_experts_without_transformer_engine, cpu_stand_in.number_tokens_of_experts),
        *(cpu_stand_in.answer_for_cpu, cpu_stand_in.gather_parts_of_any_length),
        *(optimizer.offer_to_engine, rotary.turn_by_table),
    ]  # fmt: skip
    found = {function.__name__: (function, function.needs) for function in functions}
    return found | {"KnownShapes": _known_shapes(), "_Planner": _planner()}


def _known_shapes() -> tuple[Callable, tuple[str, ...]]:
    from megatron_ft.engine.exchange import known_shapes

    part = "megatron.core.pipeline_parallel.p2p_communication:P2PCommunicator._communicate_shapes"
    return lambda: known_shapes(None, []), (part,)


def _planner() -> tuple[Callable, tuple[str, ...]]:
    from megatron_ft.checkpoints.training_state import _Planner

    part = "megatron.core.dist_checkpointing.strategies.torch:TorchDistSaveShardedStrategy._get_save_and_finalize_callbacks"
    return lambda: _Planner("torch_dist", 1).plan({}, None), (part,)


def errors_without_each_part() -> dict[str, list[tuple[str, str | None]]]:
    """Take each part away in turn, and make the change: name of the change -> (part, the error's words or None).

    Of the changes for this engine, and of its parts: torch's are left alone.
    """
    return {
        name: [(part, _error_without(part, change)) for part in parts if part.startswith("megatron")]
        for name, (change, parts) in changes().items()
        if name in ("KnownShapes", "_Planner") or change.versions[0] <= release(installed()) <= change.versions[1]
    }


def _error_without(part: str, change: Callable) -> str | None:
    """A method is taken away from the classes that its own inherits it from, too."""
    module, name = part.split(":")
    place, (*owners, last) = importlib.import_module(module), name.split(".")
    for owner in owners:
        place = getattr(place, owner)
    kept = [(one, vars(one)[last]) for one in getattr(place, "__mro__", [place]) if last in vars(one)]
    for one, _ in kept:
        delattr(one, last)
    try:
        change()
        return None
    except EngineError as error:
        return str(error)
    finally:
        for one, value in kept:
            setattr(one, last, value)


def ranges() -> dict[str, tuple]:
    """The releases that each marked change is for."""
    return {name: change.versions for name, (change, _) in changes().items() if hasattr(change, "versions")}


def changed_parts() -> dict[str, str]:
    """Which module now has made a few of the parts that are changed."""
    from megatron.core import tensor_parallel
    from megatron.core.dist_checkpointing.strategies import filesystem_async
    from megatron.core.dist_checkpointing.strategies.torch import MCoreLoadPlanner
    from megatron.core.transformer import attention

    from megatron_ft.models.rotary import turn_by_table

    turn_by_table()
    return {
        "load_bytes": MCoreLoadPlanner.load_bytes.__module__,
        "CheckpointWithoutOutput": tensor_parallel.CheckpointWithoutOutput.__module__,
        "apply_rotary_pos_emb": attention.apply_rotary_pos_emb.__module__,
        "_results_queue": type(filesystem_async._results_queue).__module__,
    }


def run_for(versions: str) -> list[str]:
    """Make a change that is for these releases: ["made"], or [] where it was left alone."""
    made: list[str] = []
    patch(versions)(lambda: made.append("made"))()
    return made


def version() -> str:
    """Of the engine that is installed, by its own word."""
    return installed()
