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
def meeting_place(places: Places) -> Iterator[tuple[Places, socket.socket | None]]:
    """Yield the places and the socket that rank 0 is to listen on; None where that is on another machine, or the user named the port.

    Of one machine the places come with the port. Of several they keep that of the launchers, who tell each other the ranks' (nodes.py).
    """
    if places.node or (places.nodes == 1 and places.port):
        yield places, None
        return
    with _held() as held:
        yield replace(places, port=places.port or held.getsockname()[1]), held


def _held() -> socket.socket:
    """A socket bound to a free port of every address: rank 0 listens on it."""
    both = socket.has_dualstack_ipv6()
    held = socket.socket(socket.AF_INET6 if both else socket.AF_INET, socket.SOCK_STREAM)
    if both:
        held.setsockopt(socket.IPPROTO_IPV6, socket.IPV6_V6ONLY, 0)
    held.bind(("", 0))
    return held
