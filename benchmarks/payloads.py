"""Pickles that run something as soon as a careless reader loads them, and a hook that sees it when they do.

Harmless in themselves: each would make, or look for, a file with the canary's name.
"""

from __future__ import annotations

import contextlib
import os
import pickle
import shutil
import tempfile
from collections.abc import Callable
from pathlib import Path

import torch

CANARY = "canary-" + os.urandom(4).hex()
seen: list[str] = []
_watching = [False]


def watch(event: str, arguments: tuple) -> None:
    """What the interpreter does: whatever it is, if it names the canary or starts a shell, a payload has run."""
    if _watching[0] and (event in ("os.system", "pty.spawn", "webbrowser.open") or CANARY in repr(arguments)[:4000]):
        seen.append(f"{event} {repr(arguments)[:100]}")


class Planted:
    """Pickles as a call of `function(*arguments)`."""

    def __init__(self, function: Callable, *arguments):
        self.call = function, arguments

    def __reduce__(self):
        return self.call


def payloads() -> dict[str, bytes]:
    """name -> pickle. Harmless in itself: it would make or look for a file with the canary's name."""
    import ctypes
    import importlib
    import runpy
    import socket
    import subprocess
    import timeit

    place = os.path.join(tempfile.gettempdir(), CANARY)
    text = f"open({place!r}, 'w').close()"
    calls = {
        "os.system": (os.system, f"touch {place}"),
        "subprocess.Popen": (subprocess.Popen, ["touch", place]),
        "subprocess.check_output": (subprocess.check_output, ["touch", place]),
        "eval": (eval, text),
        "exec": (exec, text),
        "open": (open, place, "w"),
        "os.open": (os.open, place, os.O_CREAT | os.O_WRONLY),
        "os.mkdir": (os.mkdir, place),
        "shutil.rmtree": (shutil.rmtree, place, True),
        "os.listdir": (os.listdir, place),
        "import_module": (importlib.import_module, CANARY.replace("-", "_") + "." + CANARY),
        "__import__": (__import__, CANARY),
        "runpy.run_path": (runpy.run_path, place),
        "timeit": (timeit.timeit, text, "pass", timeit.default_timer, 1),
        "ctypes.CDLL": (ctypes.CDLL, place),
        "socket": (socket.getaddrinfo, CANARY + ".invalid", 80),
        "pickle.loads": (pickle.loads, pickle.dumps(Planted(open, place, "w"))),
        "torch.load": (torch.load, place),
        "Path.open": (Path.open, Path(place), "w"),
        "os.symlink": (os.symlink, "x", place),
    }
    found = {name: pickle.dumps(Planted(*call), 2) for name, call in calls.items()}
    touch = f"touch {place}"
    found["GLOBAL posix.system"] = (
        b"\x80\x02cposix\nsystem\nX" + len(touch).to_bytes(4, "little") + touch.encode() + b"\x85R."
    )
    found["STACK_GLOBAL"] = pickle.dumps(Planted(os.system, touch), 4)
    found["INST"] = b"(S'" + touch.encode() + b"'\nios\nsystem\n."
    found["OBJ"] = b"(cos\nsystem\nS'" + touch.encode() + b"'\no."
    dotted = b"\x8c\x08argparse\x8c\x0d_os.system"[:-10] + b"\x8c\x0a_os.system"
    found["dotted name"] = b"\x80\x04" + dotted + b"\x93\x8c" + bytes([len(touch)]) + touch.encode() + b"\x85R."
    return found


def proved(pickles: dict[str, bytes]) -> list[str]:
    """The payloads that a careless reader does run, as the hook sees it."""
    return [name for name, data in pickles.items() if ran(lambda data=data: pickle.loads(data))]


def ran(action: Callable[[], object]) -> list[str]:
    """What the hook saw of a payload while `action` ran, however it ended. The canary is removed."""
    place = Path(tempfile.gettempdir(), CANARY)
    seen.clear()
    _watching[0] = True
    try:
        with contextlib.suppress(Exception):
            action()
    finally:
        _watching[0] = False
    found = list(seen)
    if place.is_dir() and not place.is_symlink():
        place.rmdir()
    place.unlink(missing_ok=True)
    return found
