"""Bit-exact comparison of two Hugging Face model folders, of which the second may have additional rows."""

from dataclasses import dataclass
from pathlib import Path
from typing import Any


@dataclass(frozen=True)
class Comparison:
    """identical: the copy has every tensor of the original with the same bytes, apart from additional rows at the end."""

    tensors: int
    identical: bool
    added_rows: int
    first_difference: str | None


def compare_models(original: Path, copy: Path) -> Comparison:
    """Compare two folders with one model.safetensors each. Tensors of the copy may have additional rows at the end."""
    from safetensors import safe_open

    with safe_open(original / "model.safetensors", "pt") as old, safe_open(copy / "model.safetensors", "pt") as new:
        names, others = list(old.keys()), list(new.keys())
        different = sorted(set(names) ^ set(others))
        added = 0
        for name in sorted(set(names) & set(others)):
            same, rows = _same(old.get_tensor(name), new.get_tensor(name))
            added = max(added, rows)
            if not same:
                different.append(name)
    return Comparison(len(names), not different, added, different[0] if different else None)


def _same(old: Any, new: Any) -> tuple[bool, int]:
    """Return (whether the rows of the old tensor have the same bytes in the new one, number of added rows)."""
    import torch

    if old.dtype != new.dtype or old.shape[1:] != new.shape[1:] or old.shape[0] > new.shape[0]:
        return False, 0
    common = new[: old.shape[0]].contiguous()
    # As bytes: -0.0 and 0.0 are equal numbers, and NaN is not equal to itself.
    return torch.equal(old.contiguous().view(torch.uint8), common.view(torch.uint8)), new.shape[0] - old.shape[0]
