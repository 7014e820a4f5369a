"""Tensor names that tools change: a prefix before all of them, or the prefix of the whole model left out.

Only changes after which every name that is wanted is there are made; a state dict in another is opened the same way.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping
from typing import Any

from megatron_ft.models.torch_file import TensorRef

PREFIXES = ("module.", "_orig_mod.", "base_model.model.", "model.", "transformer.", "language_model.")
"""Of DistributedDataParallel, torch.compile, PEFT, Lightning and models that contain the language model."""
HOLDERS = ("state_dict", "model_state_dict", "model", "module", "weights")
"""Keys of the state dict in files that hold more than it."""
_MOST = 3  # prefixes one before another


def renamed(found: Collection[str], wanted: Collection[str]) -> dict[str, str]:
    """Return the stored name of every tensor: wanted name -> stored name, for other tensors their own name.

    {} if the names are as wanted already, or no change of prefixes makes them so.
    """
    if set(wanted) <= set(found):
        return {}
    for stored in _changed(found):
        if set(wanted) <= set(stored):
            return stored
    return {}


def _changed(found: Collection[str]) -> list[dict[str, str]]:
    """Every change: prefixes taken away, the model's own prefix put before the names."""
    results, names = [], {name: name for name in found}
    for _ in range(_MOST):
        prefix = next((one for one in PREFIXES if names and all(name.startswith(one) for name in names)), None)
        if prefix is None:
            break
        names = {name.removeprefix(prefix): stored for name, stored in names.items()}
        results.append(names)
    for own in ("model.", "transformer."):
        results.append({name if name.startswith("lm_head") else own + name: stored for name, stored in names.items()})
    return results


def state_dict_in(value: Any) -> Mapping[str, TensorRef] | None:
    """Return the state dict in what a file holds: the file's own dict, or one at HOLDERS. None: there is none."""
    for _ in range(_MOST):
        if not isinstance(value, dict):
            return None
        if value and all(isinstance(ref, TensorRef) for ref in value.values()):
            return value
        value = next((value[key] for key in HOLDERS if isinstance(value.get(key), dict)), None)
    return None


def what_else(value: Any) -> str:
    """Return what a file without a state dict holds, in brackets: where tensors are, or what lies between them."""
    if not isinstance(value, dict) or not value:
        return " (it is empty)" if value in (None, {}, []) else ""
    if any(isinstance(entry, TensorRef) for entry in value.values()):
        other = next(key for key, entry in value.items() if not isinstance(entry, TensorRef))
        return f" ({str(other)[:60]!r} in it is none)"
    holders = [str(key)[:60] for key, entry in value.items() if isinstance(entry, dict) and state_dict_in(entry)]
    return f" (it has such dicts as {', '.join(map(repr, holders[:3]))})" if holders else ""
