"""The rendezvous port of the ranks of one machine: the launcher finds a free one, keeps it bound, and passes it to rank 0.

If the launcher released the port, another program could take it before rank 0 has imported torch.
"""

from __future__ import annotations

import contextlib
import socket
from collections.abc import Iterator
from dataclasses import replace

from megatron_ft.launch.places import Places


@contextlib.contextmanager
def meeting_place(places: Places) -> Iterator[tuple[Places, socket.socket | None]]:
    """Yield the places and the socket on which rank 0 listens; None if rank 0 is on another machine, or the user set the port.

    On one machine the places contain this port. On several they keep the launchers' port; the launchers exchange the ranks' (nodes.py).
    """
    if places.node or (places.nodes == 1 and places.port):
        yield places, None
        return
    with _held() as held:
        yield replace(places, port=places.port or held.getsockname()[1]), held


def _held() -> socket.socket:
    """Return a socket bound to a free port on every address, on which rank 0 listens."""
    both = socket.has_dualstack_ipv6()
    held = socket.socket(socket.AF_INET6 if both else socket.AF_INET, socket.SOCK_STREAM)
    if both:
        held.setsockopt(socket.IPPROTO_IPV6, socket.IPV6_V6ONLY, 0)
    held.bind(("", 0))
    return held
