"""The supported versions of megatron-core, and a check that the parts that a patch changes still exist.

It uses only the names of the engine's parts.
"""

from __future__ import annotations

import functools
import importlib
import re
from collections.abc import Callable

from megatron_ft.errors import EngineError

TRIED = ("0.16.1", "0.19.2")
"""megatron-core versions that all of tests/parallel passes with, in order. The last ones need Python 3.12."""

Release = tuple[int, int]


def release(version: str) -> Release:
    """Return the numbers that name a release: (0, 19) of "0.19", "0.19.2" and "0.19.0rc1"."""
    major, minor = re.findall(r"\d+", version)[:2]
    return int(major), int(minor)


SUPPORTED = tuple(release(version) for version in TRIED)
"""Other releases are refused: the engine's inside changes from one to the next."""

_REMEDY = f"pip install megatron-core=={TRIED[-1]} (Python 3.12) or {TRIED[0]}"


def check_version(version: str) -> None:
    """Raise EngineError unless `version` is of a release that was tried."""
    if release(version) not in SUPPORTED:
        raise EngineError(
            f"megatron-core {version} is installed, but megatron_ft was tried with {' and '.join(TRIED)}: {_REMEDY}"
        )


def installed() -> str:
    """Return megatron-core's version. prepare_engine has imported it."""
    import megatron.core

    return megatron.core.__version__


def patch(versions: str, *needs: str) -> Callable:
    """Mark a function that changes the engine's inside. It raises EngineError where a part that it changes is not there.

    versions: the releases it is for, "0.16 to 0.19"; with others the function does nothing. needs: see check_parts.
    """
    first, last = map(release, versions.split(" to "))

    def decorate(function: Callable[[], None]) -> Callable[[], None]:
        @functools.wraps(function)
        def apply() -> None:
            if first <= release(installed()) <= last:
                check_parts(function.__name__, *needs)
                function()

        apply.__dict__.update(versions=(first, last), needs=needs)
        return apply

    return decorate


def check_parts(name: str, *needs: str) -> None:
    """Raise EngineError where a part is not there. name: of what changes it. needs: "module:attribute" or "module:Class.attribute".

    Without it, a part that was renamed would be set anew, and nothing would ever read it.
    """
    missing = [need for need in needs if not _is_there(need)]
    if missing:
        raise EngineError(
            f"{', '.join(missing)}: not in megatron-core {installed()}, and {name} changes it (tried with {' and '.join(TRIED)}): {_REMEDY}"
        )


def _is_there(need: str) -> bool:
    module, attributes = need.split(":")
    try:
        found = importlib.import_module(module)
        for attribute in attributes.split("."):
            found = getattr(found, attribute)
    except (ModuleNotFoundError, AttributeError):
        return False
    return True
