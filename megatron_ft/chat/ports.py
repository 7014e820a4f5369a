"""The port of the page: on this machine only."""

from __future__ import annotations

import errno
import socket

from megatron_ft.errors import ConfigError

LOOPBACK = "127.0.0.1"


def check_port(port: int) -> None:
    """Raise ConfigError if nothing can listen on a port."""
    if not 0 <= port <= 65535:
        raise ConfigError(f"--port {port}: give a number from 1 to 65535, or 0 for a free port")
    with socket.socket() as trial:
        trial.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            trial.bind((LOOPBACK, port))
        except OSError as error:
            raise refused(port, error) from None


def refused(port: int, error: OSError) -> ConfigError:
    """Return the error of a port that cannot be had."""
    if error.errno == errno.EADDRINUSE:
        return ConfigError(f"--port {port}: another program uses this port: give another number, or 0 for a free port")
    why = (error.strerror or str(error)).lower()
    return ConfigError(f"--port {port}: cannot be used ({why}): give another number, or 0 for a free port")
