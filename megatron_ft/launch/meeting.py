"""Where the ranks of one machine meet: a port that the launcher finds, holds from then on, and hands to rank 0.

A port that is found and let go again may be another program's a second later, before rank 0 has imported torch.
"""

from __future__ import annotations

import contextlib
import socket
from collections.abc import Iterator
from dataclasses import replace

from megatron_ft.launch.places import Places


@contextlib.contextmanager
def meeting_place(places: Places) -> Iterator[tuple[Places, int | None]]:
    """Yield the places with a port, and the descriptor of the socket that holds it; None where the user named the port."""
    if places.port:
        yield places, None
        return
    with _held() as held:
        yield replace(places, port=held.getsockname()[1]), held.fileno()


def _held() -> socket.socket:
    """A socket bound to a free port of every address: rank 0 listens on it."""
    both = socket.has_dualstack_ipv6()
    held = socket.socket(socket.AF_INET6 if both else socket.AF_INET, socket.SOCK_STREAM)
    if both:
        held.setsockopt(socket.IPPROTO_IPV6, socket.IPV6_V6ONLY, 0)
    held.bind(("", 0))
    return held
