"""The changes to megatron-core, each a function with its reason. The backend for the CPU is in cpu_stand_in.py."""

from __future__ import annotations

import queue
from typing import Any

from megatron_ft.engine.versions import patch


def apply() -> None:
    """Make all changes below. megatron-core has been imported."""
    pass_write_results_in_process()
    remove_writer_warning()
    recompute_norms_without_fp8()
    read_objects_with_restrictions()
    choose_experts_without_transformer_engine()


@patch("0.16 to 0.19", "megatron.core.dist_checkpointing.strategies.filesystem_async:_results_queue")
def pass_write_results_in_process() -> None:
    """Pass the results of a write within this process, because checkpoints are saved synchronously.

    megatron-core uses a queue in a manager process. That process imports torch again, which takes seconds at the first save of every rank,
    and it keeps running after a rank is killed.
    """
    from megatron.core.dist_checkpointing.strategies import filesystem_async

    filesystem_async._results_queue = queue.SimpleQueue()


@patch("0.19 to 0.19", "megatron.core.dist_checkpointing.strategies.torch:_logged_mcore_async_deprecation")
def remove_writer_warning() -> None:
    """Remove a warning at every rank's first save: that the engine's writer is to be replaced by that of another package.

    Here the engine only plans a save and writes buckets of tensors. A user cannot choose the writer.
    """
    from megatron.core.dist_checkpointing.strategies import torch as strategies

    strategies._logged_mcore_async_deprecation = True


@patch("0.16 to 0.19", "megatron.core.dist_checkpointing.strategies.torch:MCoreLoadPlanner.load_bytes")
def read_objects_with_restrictions() -> None:
    """Read the objects among a checkpoint's tensors with the unpickler for tensors, which refuses all other types.

    torch's reader unpickles them without limits, so a malicious checkpoint could run any code.
    """
    import torch
    from megatron.core.dist_checkpointing.strategies.torch import MCoreLoadPlanner

    free = MCoreLoadPlanner.load_bytes

    def load_bytes(self: Any, read_item: Any, value: Any) -> None:
        start = value.tell()
        torch.load(value, weights_only=True)  # refuses other types than tensors and plain containers
        value.seek(start)
        free(self, read_item, value)

    MCoreLoadPlanner.load_bytes = load_bytes


@patch(
    "0.16 to 0.19",
    "megatron.core.tensor_parallel:CheckpointWithoutOutput",
    "megatron.core.tensor_parallel.random:CheckpointWithoutOutput",
)
def recompute_norms_without_fp8() -> None:
    """Do not request the fp8 state of Transformer Engine for recomputed norms. Without Transformer Engine the request fails."""
    from megatron.core import tensor_parallel
    from megatron.core.tensor_parallel import random as engine_random

    if hasattr(engine_random, "FP8GlobalStateManager"):
        return

    class WithoutFp8(engine_random.CheckpointWithoutOutput):
        def __init__(self, fp8: Any = None):
            super().__init__(None)

    tensor_parallel.CheckpointWithoutOutput = WithoutFp8


@patch("0.16 to 0.16", "megatron.core.transformer.moe.moe_utils:RouterGatingLinearFunction")
def choose_experts_without_transformer_engine() -> None:
    """The router asks for a product of Transformer Engine's by a name that is not defined where that is not installed, and fails.

    Without it, it has torch's product.
    """
    from megatron.core.transformer.moe import moe_utils

    if not hasattr(moe_utils, "te_general_gemm"):
        moe_utils.te_general_gemm = None
