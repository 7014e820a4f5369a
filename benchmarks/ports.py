"""A port for programs that are started later. Not an ephemeral one: the system gives those to any connection in the meantime."""

from __future__ import annotations

import random
import socket
from pathlib import Path

_RANGE = Path("/proc/sys/net/ipv4/ip_local_port_range")
_FIRST_EPHEMERAL = 32768
"""Where the system does not say it: Linux's default."""


def free_port() -> int:
    """Return a port that nobody listens on now and that the system does not give away by itself."""
    first = int(_RANGE.read_text().split()[0]) if _RANGE.exists() else _FIRST_EPHEMERAL
    choice = random.SystemRandom()
    for _ in range(1000):
        port = choice.randrange(10_000, first) if first > 10_000 else 0
        try:
            with socket.create_server(("", port)) as found:
                return found.getsockname()[1]
        except OSError:
            continue
    raise RuntimeError("no port is free")
