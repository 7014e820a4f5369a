"""Messages between two launchers over TCP, one JSON object per line."""

from __future__ import annotations

import contextlib
import json
import socket

_IDLE, _BETWEEN, _TIMES = 20, 10, 4  # s, s, probes: a machine that loses its network is noticed after a minute
_SENDING = 10.0  # seconds


class ConnectionLost(Exception):
    """The connection is lost. ended: the other end closed it; else it does not respond and may still be running."""

    def __init__(self, ended: bool):
        super().__init__("ended" if ended else "does not respond")
        self.ended = ended


class Wire:
    """One end of a connection. A context manager."""

    def __init__(self, connection: socket.socket):
        self._socket = connection
        self._rest = b""
        connection.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)
        for option, value in {"TCP_KEEPIDLE": _IDLE, "TCP_KEEPINTVL": _BETWEEN, "TCP_KEEPCNT": _TIMES}.items():
            if hasattr(socket, option):
                connection.setsockopt(socket.IPPROTO_TCP, getattr(socket, option), value)

    def send(self, message: dict) -> None:
        """Send a message. Raise ConnectionLost."""
        try:
            self._socket.settimeout(_SENDING)
            self._socket.sendall(json.dumps(message).encode() + b"\n")
        except OSError as error:
            raise ConnectionLost(isinstance(error, ConnectionError)) from error

    def receive(self) -> list[dict]:
        """Return the messages received so far, without waiting. Raise ConnectionLost at the end, and for data that is no message."""
        closed = False
        try:
            self._socket.setblocking(False)
            while not closed:
                data = self._socket.recv(1 << 16)
                closed = not data
                self._rest += data
        except BlockingIOError:
            pass
        except OSError as error:
            raise ConnectionLost(isinstance(error, ConnectionError)) from error
        *lines, self._rest = self._rest.split(b"\n")
        try:
            messages = [json.loads(line) for line in lines]
        except ValueError as error:
            raise ConnectionLost(True) from error
        if closed and not messages:
            raise ConnectionLost(True)
        return [message for message in messages if isinstance(message, dict)]

    def close(self) -> None:
        with contextlib.suppress(OSError):
            self._socket.close()
