"""The exchange between pipeline stages if microbatches differ in length (--variable_seq_lengths).

In the engine each stage sends the shape of every tensor to the next before the tensor, and waits for the answer and the device. Here
every stage already has the shapes, because it builds the same microbatches.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from megatron.core import parallel_state
from megatron.core.pipeline_parallel.p2p_communication import P2PCommunicator
from megatron.core.process_groups_config import ProcessGroupCollection

from megatron_ft.engine.versions import check_parts

Shape = tuple[int, int, int]


class KnownShapes(P2PCommunicator):
    """The engine's exchange for the schedule without interleaving, which gets the shape [s, b, h] of every microbatch of a step in advance.

    A stage receives activations, and gradients likewise, in the order of the microbatches.
    """

    def __init__(self, group: Any, config: Any, shapes: Sequence[Shape]):
        super().__init__(group, config)
        self._activations, self._gradients = iter(shapes), iter(shapes)

    def _communicate_shapes(
        self, tensor_send_next: Any, tensor_send_prev: Any, recv_prev: bool, recv_next: bool
    ) -> tuple[list[int], list[int]]:
        """Return the shapes of what comes from the previous and from the next stage. In the place of the engine's exchange."""
        from_previous = next(self._activations) if recv_prev else (0, 0, 0)
        from_next = next(self._gradients) if recv_next else (0, 0, 0)
        return list(from_previous), list(from_next)


def known_shapes(config: Any, shapes: Sequence[Shape]) -> dict:
    """Return the arguments that have the engine's schedule use KnownShapes: it takes them together with all groups, or not at all."""
    check_parts("KnownShapes", "megatron.core.pipeline_parallel.p2p_communication:P2PCommunicator._communicate_shapes")
    groups = ProcessGroupCollection()
    groups.tp = parallel_state.get_tensor_model_parallel_group()
    groups.pp = parallel_state.get_pipeline_model_parallel_group()
    groups.cp = parallel_state.get_context_parallel_group()
    groups.embd = parallel_state.get_embedding_group(check_initialized=False)
    groups.pos_embd = parallel_state.get_position_embedding_group(check_initialized=False)
    groups.dp_cp = parallel_state.get_data_parallel_group(with_context_parallel=True, partial_data_parallel=False)
    return {"p2p_communicator": KnownShapes(groups.pp, config, shapes), "pg_collection": groups}
