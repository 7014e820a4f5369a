"""Copies the output of ranks into one file per rank and to this process's standard output and error."""

from __future__ import annotations

import os
import selectors
import sys
import time
from collections.abc import Sequence
from io import FileIO
from pathlib import Path

from megatron_ft.launch.ranks import Rank

_AT_ONCE = 1 << 16  # bytes


class Relay:
    """Copies output. log_dir: folder of rank-000.log and so on, appended to; None: ranks have our output and nothing is copied."""

    def __init__(self, ranks: Sequence[Rank], log_dir: Path | None):
        self._selector = selectors.DefaultSelector()
        self._files: list[FileIO] = []
        self._given_up: set[FileIO] = set()
        if log_dir is None:
            return
        for rank in ranks:
            file = (log_dir / f"rank-{rank.number:03d}.log").open("ab", buffering=0)
            self._files.append(file)
            for number, end in rank.outputs.items():
                self._selector.register(end, selectors.EVENT_READ, (number, file))

    def copy(self, seconds: float) -> bool:
        """Copy available output; wait at most this many seconds for some. Return True if there was any."""
        if not self._selector.get_map():
            time.sleep(seconds)
            return False
        ready = self._selector.select(seconds)
        for key, _ in ready:
            data = os.read(key.fd, _AT_ONCE)
            if not data:
                self._selector.unregister(key.fd)
                os.close(key.fd)
                continue
            number, file = key.data
            self._log(file, data)
            os.write(number, data)
        return bool(ready)

    def _log(self, file: FileIO, data: bytes) -> None:
        """Write to a log. If that fails, warn once and stop writing to it; the run continues."""
        if file not in self._given_up:
            try:
                file.write(data)
            except OSError as error:
                self._given_up.add(file)
                print(
                    f"warning: {file.name}: {(error.strerror or str(error)).lower()}; nothing more is written to this log",
                    file=sys.stderr,
                )

    def finish(self) -> None:
        """Copy the rest of the output after all ranks have ended."""
        while self._selector.get_map() and self.copy(0.2):
            pass
        for file in self._files:
            file.close()
