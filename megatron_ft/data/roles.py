"""Who speaks: what a byte of a role shard says of a token, and the loss weight that training makes of it.

    bits 0-2  role: 0 system, 1 prompter, 2 assistant, 3 context or plain text
    bit  3    marked: language-modelling loss was asked for on this token, whoever speaks
    bits 4-7  number of the message's own weight in the manifest's `weights`; 0 is weight 1

Shards without marks and weights hold the bare role numbers, as Megatron-LLM's do. Nothing here is a decision: what a
mark and a role are worth is said when training starts. Knows nothing of how a chat format spells a role, nor which
tokens a turn consists of.
"""

from collections.abc import Mapping, Sequence

import numpy as np

from megatron_ft.errors import ConfigError, DataError

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


def display_name(role: str) -> str:
    """Return the name of a role for people: files keep Open-Assistant's "prompter", which is shown as "user"."""
    return "user" if role == "prompter" else role


ROLE_BITS, MARKED, WEIGHT_SHIFT = 0b111, 0b1000, 4
MOST_WEIGHTS = 16  # different weights of messages in one set of shards, 1 included


def loss_weights(scalar_loss_mask: float = 0.0, weights: Mapping[str, float] | None = None) -> np.ndarray:
    """The loss weight of a token by its role: float32 [4], indexed by role number.

    scalar_loss_mask: weight of every role but the assistant, whose weight is 1.
    weights: role name (as in chat files) -> weight, going before both.
    Raise ConfigError for an unknown role or a weight that is negative or not finite.
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


def code_weights(
    by_role: np.ndarray, message_weights: Sequence[float] = (1.0,), marked_loss_weight: float = 1.0
) -> np.ndarray:
    """The loss weight of a token by its byte in the role shard: float32 [256], to be indexed with Shards.codes.

    by_role: float32 [4], from loss_weights. message_weights: the manifest's. A marked token has marked_loss_weight where
    its role's weight is smaller; then either is multiplied by the weight of the message.
    """
    codes = np.arange(256)
    role, number = codes & ROLE_BITS, codes >> WEIGHT_SHIFT
    known = (role < len(ROLE_NAMES)) & (number < len(message_weights))
    result = np.where(known, np.asarray(by_role, np.float32)[np.minimum(role, len(ROLE_NAMES) - 1)], 0)
    result = np.where(known & (codes & MARKED > 0), np.maximum(result, marked_loss_weight), result)
    own = np.asarray(message_weights, np.float32)[np.minimum(number, len(message_weights) - 1)]
    return (result * own).astype(np.float32)


def weight_table(weights: Sequence[float]) -> list[float]:
    """The table of a set of shards from the weights that occur in it: 1 first, the others by size.

    Raise DataError for more than MOST_WEIGHTS, or one that is negative or not finite.
    """
    for weight in weights:
        if not (np.isfinite(weight) and weight >= 0):
            raise DataError(f"a message has the weight {weight}; give a number that is not negative")
    table = [1.0, *sorted({float(weight) for weight in weights} - {1.0})]
    if len(table) > MOST_WEIGHTS:
        raise DataError(
            f"messages have {len(table)} different weights, shards hold {MOST_WEIGHTS}; round them to fewer values"
        )
    return table
