"""Who speaks: the four roles a token can carry in a shard, and the loss weight each role gets when training starts.

Knows nothing of how a chat format spells a role, nor which tokens a turn consists of.
"""

from collections.abc import Mapping

import numpy as np

from megatron_ft.errors import ConfigError

SYSTEM, PROMPTER, ASSISTANT, CONTEXT = range(4)
ROLE_NAMES = (
    "system",
    "prompter",
    "assistant",
    "context",
)  # index = the number in the role shards, as in Megatron-LLM's

# What chat files call the speakers. A tool's answer is something the model reads, hence context.
ROLES = {
    "system": SYSTEM,
    "prompter": PROMPTER,
    "user": PROMPTER,
    "assistant": ASSISTANT,
    "context": CONTEXT,
    "tool": CONTEXT,
}


def loss_weights(scalar_loss_mask: float = 0.0, weights: Mapping[str, float] | None = None) -> np.ndarray:
    """The loss weight of a token by its role: float32 [4], indexed by role number.

    scalar_loss_mask: weight of every role but the assistant, whose weight is 1.
    weights: role name (as in chat files) -> weight, going before both.
    Raises ConfigError for an unknown role or a weight that is negative or not finite.
    """
    result = np.full(len(ROLE_NAMES), scalar_loss_mask, dtype=np.float32)
    result[ASSISTANT] = 1.0
    for name, weight in (weights or {}).items():
        if name not in ROLES:
            raise ConfigError(f"loss weight for unknown role '{name}': the roles are {', '.join(ROLES)}")
        result[ROLES[name]] = weight
    if not np.isfinite(result).all() or (result < 0).any():
        raise ConfigError(f"loss weights must be finite and not negative, got {result.tolist()}")
    return result
