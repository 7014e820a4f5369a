"""A lock of the folder that steps write to, which ends with the process."""

from __future__ import annotations

import contextlib
import fcntl
from collections.abc import Iterator
from pathlib import Path

from megatron_ft.errors import ConfigError


@contextlib.contextmanager
def held(file: Path, refusal: str) -> Iterator[None]:
    """Hold a file, which is made if it is not there. Raise ConfigError with `refusal` while another process holds it."""
    with open(file, "ab") as handle:
        try:
            fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise ConfigError(refusal) from None
        except OSError:
            pass  # a file system without locks
        yield
