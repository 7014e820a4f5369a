"""What the user types: lines with editing and history in a terminal, plain lines from a pipe, and messages of several lines."""

from __future__ import annotations

import contextlib
import os
import sys
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

BLOCK = '"""'
"""Begins and ends a message of several lines."""
PROMPT, MORE = "> ", "... "
_KEPT = 1000


def messages(read: Callable[[str], str | None]) -> Iterator[str]:
    """Yield what is typed, without empty lines, until the input ends. read: returns a line, given the prompt to show; None at the end.

    A line that ends with a backslash goes on in the next one, and a block between triple quotes is one message. After Ctrl-C everything
    typed of a message is forgotten.
    """
    while True:
        try:
            text = _message(read)
        except KeyboardInterrupt:
            print(file=sys.stderr)
            continue
        if text is None:
            return
        if text.strip():
            yield _readable(text.strip())


def _message(read: Callable[[str], str | None]) -> str | None:
    line = read(PROMPT)
    if line is None:
        return None
    if line.lstrip().startswith(BLOCK):
        return _block(line.lstrip().removeprefix(BLOCK), read)
    lines = []
    while line is not None and line.endswith("\\"):
        lines.append(line[:-1])
        line = read(MORE)
    return "\n".join([*lines, line or ""])


def _block(line: str | None, read: Callable[[str], str | None]) -> str:
    lines = []
    while line is not None and not line.rstrip().endswith(BLOCK):
        lines.append(line)
        line = read(MORE)
    return "\n".join([*lines, (line or "").rstrip().removesuffix(BLOCK)])


def is_terminal() -> bool:
    """Say if a person types, and reads the answers."""
    return sys.stdin.isatty() and sys.stdout.isatty()


def from_pipe(_: str) -> str | None:
    """Return the next line of standard input, without a prompt."""
    line = sys.stdin.buffer.readline()
    return line.decode("utf-8", "replace").rstrip("\r\n") if line else None


def _readable(text: str) -> str:
    """Return a text with the sign for unknown characters in place of bytes that are none: terminals send whatever is typed."""
    return text.encode("utf-8", "surrogateescape").decode("utf-8", "replace")


def in_terminal(history: Path | None, completed: Sequence[str]) -> Callable[[str], str | None]:
    """Return a function that reads a line with editing. history: file of earlier lines; None: none is kept. completed: words for Tab."""
    remember = _set_up(history, completed)

    def read(prompt: str) -> str | None:
        try:
            line = input(prompt)
        except EOFError:
            print()
            return None
        remember()
        return line

    return read


def _set_up(history: Path | None, completed: Sequence[str]) -> Callable[[], None]:
    """Prepare readline, where Python has it. Return what is called after each line."""
    try:
        import readline
    except ImportError:  # a Python that was built without it
        return lambda: None
    readline.set_completer_delims("")
    readline.set_completer(lambda text, n: next(iter([w for w in completed if text and w.startswith(text)][n:]), None))
    readline.parse_and_bind("tab: complete")
    readline.parse_and_bind("set enable-bracketed-paste on")  # what is pasted is one message
    if history is None or not _make_private(history):
        return lambda: None
    with contextlib.suppress(OSError):
        readline.read_history_file(history)
    readline.set_history_length(_KEPT)
    return lambda: _append(readline, history)


def _append(readline: Any, history: Path) -> None:
    with contextlib.suppress(OSError):  # a full disk is no reason to stop
        readline.append_history_file(1, history)


def history_file() -> Path:
    """Return the file of earlier lines: below $XDG_STATE_HOME, else ~/.local/state."""
    base = os.environ.get("XDG_STATE_HOME", "")
    if not os.path.isabs(base):  # as the specification of these variables has it
        base = os.path.join(os.path.expanduser("~"), ".local", "state")
    return Path(base, "megatron_ft", "chat_history")


def _make_private(path: Path) -> bool:
    """Make a file that only its owner can read. Return False where that is not possible; then nothing is kept."""
    try:
        path.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
        os.close(os.open(path, os.O_RDWR | os.O_CREAT, 0o600))
        path.chmod(0o600)
    except OSError:
        return False
    return True
