"""What a run trains on, as its settings say it: the loss weight of every role."""

from __future__ import annotations

from typing import TYPE_CHECKING

from megatron_ft.config.checks import role_weights
from megatron_ft.data.roles import PART_NAMES, all_weights

if TYPE_CHECKING:
    import numpy as np

    from megatron_ft.config.sections import Data


def weights_of(data: Data) -> np.ndarray:
    """Return the loss weight of every role, float32 [7]."""
    trained = (data.train_on_reasoning, data.train_on_tool_calls, data.train_on_empty_reasoning)
    untrained = [name for name, chosen in zip(PART_NAMES, trained, strict=True) if not chosen]
    return all_weights(data.scalar_loss_mask, role_weights(data), untrained)
