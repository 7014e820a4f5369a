"""Logging: our own lines go to the screen and the log file; what libraries say goes to the log file only.

Knows the process's rank only from the environment that a launcher sets, so that it works before torch is there.
"""

import logging
import os
import sys

_ROOT = "megatron_ft"
_screen_level = "INFO"  # until setup is told another
_FILE_FORMAT = "%(asctime)s %(levelname)s rank{rank} %(name)s: %(message)s"


def logger(name: str) -> logging.Logger:
    """The logger of one of our modules: logger("training") is "megatron_ft.training"."""
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

    screen = logging.StreamHandler(sys.stderr)
    screen.setLevel(_screen_level if rank == 0 else logging.ERROR)
    screen.setFormatter(_Short())
    _add(ours, screen)
    # A handler on the root, even one that drops everything, keeps Python from printing libraries' warnings itself.
    rest: logging.Handler = logging.NullHandler()
    if file is not None:
        os.makedirs(os.path.dirname(os.path.abspath(file)), exist_ok=True)
        rest = logging.FileHandler(file, mode="a", encoding="utf-8", delay=True)
        rest.setFormatter(logging.Formatter(_FILE_FORMAT.format(rank=rank)))
        rest.setLevel(logging.NOTSET if rank == 0 else logging.WARNING)  # what all do alike is said once
    _add(everything, rest)
    ours.setLevel(min(logging.INFO, screen.level))  # the file holds information even where the screen is quieter


def _add(log: logging.Logger, handler: logging.Handler) -> None:
    handler.megatron_ft = True  # type: ignore[attr-defined]
    log.addHandler(handler)


class _Short(logging.Formatter):
    """The message alone; from warnings up with the level before it."""

    def format(self, record: logging.LogRecord) -> str:
        text = super().format(record)
        return text if record.levelno < logging.WARNING else f"{record.levelname.lower()}: {text}"
