"""Logging: our lines go to the screen and the log file; messages of libraries go only to the log file.

The rank of the process is read from the environment that a launcher sets, so it works before torch is imported.
"""

import contextlib
import logging
import os
import sys
from io import TextIOWrapper

_ROOT = "megatron_ft"
_screen_level = "INFO"  # until setup sets another
FROM_ANY_RANK = {"from_any_rank": True}
"""Passed as `extra`: the line is shown on the screen from any rank, because only one rank logs it."""
ONLY_IN_FILE = {"only_in_file": True}
"""Passed as `extra`: the line is in the log file only."""
_FILE_FORMAT = "%(asctime)s %(levelname)s rank{rank} %(name)s: %(message)s"


def logger(name: str) -> logging.Logger:
    """Return the logger of one of our modules: logger("training") is "megatron_ft.training"."""
    return logging.getLogger(f"{_ROOT}.{name}")


def setup(level: str | None = None, file: str | os.PathLike | None = None) -> None:
    """Send our lines of `level` and above to standard error, and everything, libraries' warnings included, to `file`.

    level: "INFO", "WARNING", ...; None: the one set last, at first INFO.
    May be called again, for instance once the run's folder is known: the new setting replaces the old one. Where a
    launcher started several processes, only rank 0 speaks on the screen, except for errors; the file (appended to)
    holds rank 0's lines, and from warnings up those of every rank that names it.
    """
    global _screen_level
    _screen_level = level or _screen_level
    rank = int(os.environ.get("RANK", "0"))
    ours, everything = logging.getLogger(_ROOT), logging.getLogger()
    for log in (ours, everything):
        for handler in [h for h in log.handlers if getattr(h, "megatron_ft", False)]:
            log.removeHandler(handler)
            handler.close()
    logging.captureWarnings(True)  # warnings.warn of the libraries becomes log lines

    screen = _Screen(sys.stderr)
    screen.setLevel(_screen_level)
    screen.addFilter(lambda record: not hasattr(record, "only_in_file"))
    if rank:
        screen.addFilter(lambda record: record.levelno >= logging.ERROR or hasattr(record, "from_any_rank"))
    screen.setFormatter(_Short())
    _add(ours, screen)
    # A handler on the root, even one that drops everything, keeps Python from printing libraries' warnings itself.
    rest: logging.Handler = logging.NullHandler()
    if file is not None:
        rest = _LogFile(file, mode="a", encoding="utf-8", delay=True)
        rest.setFormatter(logging.Formatter(_FILE_FORMAT.format(rank=rank)))
        # Lines that are the same on all ranks are logged once.
        rest.setLevel(logging.NOTSET if rank == 0 else logging.WARNING)
    _add(everything, rest)
    ours.setLevel(min(logging.INFO, screen.level))  # the file has level INFO even if the screen has a higher one


def _add(log: logging.Logger, handler: logging.Handler) -> None:
    vars(handler)["megatron_ft"] = True
    log.addHandler(handler)


class _Screen(logging.StreamHandler):
    """Standard error. If it is a pipe whose reader has ended, errors are ignored."""

    def handleError(self, record: logging.LogRecord) -> None:
        if not isinstance(sys.exc_info()[1], OSError):
            return super().handleError(record)  # a line that cannot be made
        with contextlib.suppress(OSError, ValueError):  # and Python must not write the rest again when it ends
            os.dup2(os.open(os.devnull, os.O_WRONLY), self.stream.fileno())


class _LogFile(logging.FileHandler):
    """The log file. Its folder is made with its first line. If it cannot be written, one warning per machine is printed."""

    given_up = False

    def emit(self, record: logging.LogRecord) -> None:
        if self.given_up:
            return
        try:
            super().emit(record)
        except Exception:
            self.handleError(record)

    def _open(self) -> TextIOWrapper:
        os.makedirs(os.path.dirname(self.baseFilename), exist_ok=True)
        return super()._open()

    def handleError(self, record: logging.LogRecord) -> None:
        error = sys.exc_info()[1]
        if not isinstance(error, OSError):
            return super().handleError(record)
        self.given_up = True
        reason = error.strerror or str(error)
        if os.environ.get("LOCAL_RANK", "0") == "0":
            line = f"warning: {self.baseFilename}: {reason.lower()}; nothing more is logged there, the run continues"
            with contextlib.suppress(OSError):
                print(line, file=sys.stderr, flush=True)
        stream, self.stream = self.stream, None
        with contextlib.suppress(OSError):  # the rest cannot be flushed either
            if stream is not None:
                stream.close()


class _Short(logging.Formatter):
    """The message alone; from warnings up with the level before it."""

    def format(self, record: logging.LogRecord) -> str:
        text = super().format(record)
        return text if record.levelno < logging.WARNING else f"{record.levelname.lower()}: {text}"
