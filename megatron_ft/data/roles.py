"""The role byte that shards store for each token, and the loss weight that training computes from it.

    bits 0-2  role: 0 system, 1 prompter, 2 assistant, 3 context or plain text;
              parts of the assistant's text: 4 reasoning, 5 tool calls, 6 reasoning without text
    bit  3    marked: language-modelling loss applies to this token, in any role
    bits 4-7  index of the message's own weight in the manifest's `weights`; 0 is weight 1

Bits 3 to 7 are the mark bits. Shards without marks and weights contain only role numbers, as those of Megatron-LLM. The loss weights
of roles and marks are settings of training. Chat formats are in other modules.
"""

from collections.abc import Mapping, Sequence

import numpy as np

from megatron_ft.errors import ConfigError, DataError

SYSTEM, PROMPTER, ASSISTANT, CONTEXT, REASONING, TOOL_CALL, EMPTY_REASONING = range(7)
ROLE_NAMES = (
    "system",
    "prompter",
    "assistant",
    "context",
)  # index = the number in the role shards, as in Megatron-LLM's
PART_NAMES = ("reasoning", "tool_call", "empty_reasoning")  # of the assistant's text; their numbers follow
ALL_NAMES = ROLE_NAMES + PART_NAMES
SPOKEN = (ASSISTANT, REASONING, TOOL_CALL, EMPTY_REASONING)

# Names of roles in chat files. The model reads the result of a tool, so its role is context.
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
    return "user" if role == "prompter" else role.replace("_", " ")


def are_spoken(role_bytes: np.ndarray) -> np.ndarray:
    """Return which tokens are the assistant's, whatever part of its text: bool, of the same shape."""
    return np.isin(role_bytes & ROLE_BITS, SPOKEN)


def last_turn(role_bytes: np.ndarray) -> int:
    """Return where the assistant's last turn begins in a sample; the sample's length if there is none."""
    spoken = np.flatnonzero(are_spoken(role_bytes))
    gaps = np.flatnonzero(np.diff(spoken) > 1)
    return int(spoken[gaps[-1] + 1 if len(gaps) else 0]) if len(spoken) else len(role_bytes)


ROLE_BITS, MARKED, WEIGHT_SHIFT = 0b111, 0b1000, 4
MOST_WEIGHTS = 16  # different weights of messages in one set of shards, 1 included


def loss_weights(scalar_loss_mask: float = 0.0, weights: Mapping[str, float] | None = None) -> np.ndarray:
    """Return the loss weight of each role: float32 [4], indexed by role number.

    scalar_loss_mask: weight of every role but the assistant, whose weight is 1.
    weights: role name (as in chat files) -> weight; overrides both.
    Raise ConfigError for an unknown role or a weight that is negative or not finite.
    """
    result = np.full(len(ROLE_NAMES), scalar_loss_mask, dtype=np.float32)
    result[ASSISTANT] = 1.0
    for name, weight in (weights or {}).items():
        if name not in ROLES:
            raise ConfigError(
                f"loss weight for unknown role '{name}': the roles are {', '.join([*ROLES, *PART_NAMES])}"
            )
        result[ROLES[name]] = weight
    if not np.isfinite(result).all() or (result < 0).any():
        raise ConfigError(f"loss weights must be finite and not negative, got {result.tolist()}")
    return result


def part_weights(by_role: np.ndarray, parts: Mapping[str, float] | None = None) -> np.ndarray:
    """Return the loss weights of all roles, float32 [7], from those of the speakers. Parts of the assistant's text have its weight.

    parts: name (of PART_NAMES) -> factor.
    """
    factors = [(parts or {}).get(name, 1.0) for name in PART_NAMES]
    return np.concatenate([by_role, by_role[ASSISTANT] * np.array(factors, np.float32)]).astype(np.float32)


def all_weights(scalar_loss_mask: float, weights: Mapping[str, float], untrained: Sequence[str] = ()) -> np.ndarray:
    """Return the loss weight of each role: float32 [7]. weights: of speakers and of parts of the assistant's text.

    untrained: parts with weight 0, unless they have one in `weights`. Raise ConfigError as loss_weights does.
    """
    speakers = {name: weight for name, weight in weights.items() if name not in PART_NAMES}
    result = part_weights(loss_weights(scalar_loss_mask, speakers), dict.fromkeys(untrained, 0.0))
    for number, name in enumerate(ALL_NAMES):
        if name in PART_NAMES and name in weights:
            result[number] = weights[name]
    if not np.isfinite(result).all() or (result < 0).any():
        raise ConfigError(f"loss weights must be finite and not negative, got {result.tolist()}")
    return result


def byte_weights(
    by_role: np.ndarray, message_weights: Sequence[float] = (1.0,), marked_loss_weight: float = 1.0
) -> np.ndarray:
    """Return the loss weight of each role byte: float32 [256], to be indexed with Shards.role_bytes.

    by_role: float32 [7], from all_weights, or [4], from loss_weights, for shards without parts of the assistant's text.
    message_weights: of the manifest. A marked token has at least the weight marked_loss_weight. Every weight is multiplied by that of the
    message.
    """
    role_bytes = np.arange(256)
    role, number = role_bytes & ROLE_BITS, role_bytes >> WEIGHT_SHIFT
    known = (role < len(by_role)) & (number < len(message_weights))
    result = np.where(known, np.asarray(by_role, np.float32)[np.minimum(role, len(by_role) - 1)], 0)
    result = np.where(known & (role_bytes & MARKED > 0), np.maximum(result, marked_loss_weight), result)
    own = np.asarray(message_weights, np.float32)[np.minimum(number, len(message_weights) - 1)]
    return (result * own).astype(np.float32)


def weight_table(weights: Sequence[float]) -> list[float]:
    """Return the weight table of a set of shards from the weights that occur in it: 1 first, the others by size.

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
