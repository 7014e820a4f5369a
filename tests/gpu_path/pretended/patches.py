"""Replaced attributes of torch, kept in a list so that they can be set aside: Dynamo traces with the torch that it knows."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import Any

from torch.utils._python_dispatch import _disable_current_modes

_REPLACED: list[tuple[Any, str, Any, Any]] = []
"""(owner, name, what the owner itself had or _INHERITED, what it has now)"""
_INHERITED = object()


def replace(owner: Any, name: str, new: Any) -> None:
    """Set owner.name for good."""
    _REPLACED.append((owner, name, vars(owner).get(name, _INHERITED), new))
    setattr(owner, name, new)


@contextlib.contextmanager
def ordinary_torch() -> Iterator[None]:
    """Take every replacement and the dispatch mode away for a while."""
    for owner, name, old, _ in reversed(_REPLACED):
        if old is _INHERITED:
            delattr(owner, name)
        else:
            setattr(owner, name, old)
    try:
        with _disable_current_modes():
            yield
    finally:
        for owner, name, _, new in _REPLACED:
            setattr(owner, name, new)
