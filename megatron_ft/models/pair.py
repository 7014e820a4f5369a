"""A student and its frozen teacher as one model: one pipeline schedule runs both, their hidden states side by side.

Between stages passes [s, b, h_student + h_teacher]. The engine exchanges one tensor of one width, so the pair's config is a copy of the
student's with that hidden size. The teacher is not among the modules of the pair: so it has no gradients, is not wrapped for data
parallelism, not given to the optimizer and not saved, and `train()` does not reach it.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from megatron.core.transformer.module import MegatronModule
from torch import Tensor


class Pair(MegatronModule):
    """A chunk of the student and the same chunk of the teacher. The student is its `module`, as in the engine's wrappers."""

    teacher: Any

    def __init__(self, student: Any, teacher: Any, config: Any):
        super().__init__(config)
        self.module = student
        self.pre_process, self.post_process = student.pre_process, student.post_process
        self.share_embeddings_and_output_weights = student.share_embeddings_and_output_weights
        self.model_type, self.vp_stage, self.pg_collection = student.model_type, student.vp_stage, student.pg_collection
        self.widths = (student.config.hidden_size, teacher.config.hidden_size)
        self.__dict__["teacher"] = teacher.eval().requires_grad_(False)  # past torch's register of modules

    def shared_embedding_or_output_weight(self) -> Tensor:
        return self.module.shared_embedding_or_output_weight()

    def sharded_state_dict(self, *args: Any, **options: Any) -> dict:
        return self.module.sharded_state_dict(*args, **options)

    def set_input_tensor(self, received: Any) -> None:
        """Give each model its part of what the stage before sent."""
        joined = received[0] if isinstance(received, list) else received
        ours, theirs = (None, None) if joined is None else joined.split(self.widths, -1)
        self.module.set_input_tensor([None if ours is None else ours.contiguous()])
        self.teacher.set_input_tensor([None if theirs is None else theirs.detach().contiguous()])

    def forward(
        self, tokens: Tensor, positions: Tensor, mask: Any, labels: Tensor | None = None,
        packed_seq_params: Any = None, loss_of: Callable[..., Tensor] | None = None,
    ) -> Tensor:  # fmt: skip
        """Return what the next stage takes, [s, b, h]; on the last one what `loss_of` returns.

        loss_of: as ChatModel's, with the teacher's logits as one more argument. Without it only the student is run.
        """
        run = partial(self.module, tokens, positions, mask, labels=labels, packed_seq_params=packed_seq_params)
        if loss_of is None:
            ours = run()
            return ours if self.post_process else torch.cat([ours, self._nothing(ours)], -1)
        with torch.no_grad():
            theirs = self.teacher(
                tokens, positions, mask, labels=labels, packed_seq_params=packed_seq_params, loss_of=_logits
            )
        if not self.post_process:
            return torch.cat([run(), theirs], -1)
        return run(loss_of=partial(loss_of, theirs=theirs))

    def _nothing(self, ours: Tensor) -> Tensor:
        return ours.new_zeros(*ours.shape[:-1], self.widths[1])


def _logits(logits: Tensor, *_: Any) -> Tensor:
    """Return the logits themselves in place of a loss, [s, b, v/tp]."""
    return logits
