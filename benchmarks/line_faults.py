"""Raises MemoryError at each line of our own code that a save runs, one line after another: no older checkpoint is lost or changed.

    python benchmarks/line_faults.py [--seconds 1e9]

io_faults.py lets the system refuse; here Python itself fails. First the lines that a save runs are counted, in the package `checkpoints`
and in the modules that it writes with, in all processes of the save. Then, for each n, line n raises MemoryError. Saves in the
foreground, by a background process, by two ranks of which either may meet the fault, and over an older checkpoint of the same
iteration. A save may only succeed, with a checkpoint that is whole to the bit, or fail with what was there before, and no process may
hang. A rank that fails after the commit leaves the new checkpoint.
"""

from __future__ import annotations

import argparse
import multiprocessing
import os
import signal
import sys
import threading
import time
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from tempfile import TemporaryDirectory
from types import FrameType
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from benchmarks.io_faults import WAYS, fresh

ROOT = Path(__file__).resolve().parent.parent
PACKAGE = str(ROOT / "megatron_ft" / "checkpoints") + os.sep
MODULES = tuple(str(ROOT / "megatron_ft" / name) for name in ("files.py", "digests.py", "engine/collective_errors.py"))
DEADLINE = 60.0
"""Seconds after which a process of a save hangs."""


class Lines:
    """Counts the lines of all processes forked from here; at line `at` it raises."""

    def __init__(self) -> None:
        self._count = multiprocessing.get_context("fork").Value("l", 0)
        self._where = multiprocessing.get_context("fork").Array("c", 256)
        self._at = 0

    def start(self, at: int) -> None:
        """Count from 0. at: the line that raises; 0: none."""
        self._count.value, self._where.value, self._at = 0, b"", at

    def trace(self) -> None:
        """From now on, in this process, its threads and those forked from it."""
        threading.settrace(self._call)
        sys.settrace(self._call)

    @property
    def count(self) -> int:
        return self._count.value

    @property
    def where(self) -> str:
        """The line that raised, "" if none has."""
        return self._where.value.decode()

    def _call(self, frame: FrameType, event: str, _: Any) -> Callable | None:
        name = frame.f_code.co_filename
        return self._line if name.startswith(PACKAGE) or name in MODULES else None

    def _line(self, frame: FrameType, event: str, _: Any) -> Callable:
        if event == "line":
            with self._count.get_lock():
                self._count.value += 1
                hit = self._count.value == self._at
            if hit:
                self._where.value = f"{Path(frame.f_code.co_filename).name}:{frame.f_lineno}".encode()[:255]
                raise MemoryError
        return self._line


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seconds", type=float, default=1e9, help="stop after so many")
    parser.add_argument("--every", type=int, default=1, help="only each such line")
    parser.add_argument("--ways", nargs="*", default=list(WAYS))
    arguments = parser.parse_args()
    with TemporaryDirectory() as folder:
        found, wrong = campaign(Path(folder), arguments.ways, arguments.every, arguments.seconds)
    for way, counts in found.items():
        print(f"{way}: " + ", ".join(f"{what} {count}" for what, count in counts.items()))
    print(f"faults: {sum(map(Counter.total, found.values())):,}, wrong: {len(wrong)}")
    print("\n".join(wrong[:20]))
    sys.exit(bool(wrong))


def campaign(
    folder: Path, ways: list[str], every: int = 1, seconds: float = 1e9
) -> tuple[dict[str, Counter], list[str]]:
    """(way -> what became of the faults, what went wrong)."""
    until = time.monotonic() + seconds
    found: dict[str, Counter] = {}
    wrong: list[str] = []
    before, lines = folder / "before", Lines()
    from benchmarks import small_saves  # noqa: F401 - once, here: the forked ranks have it then

    lines.start(0)
    assert _run(before, lines, 1, False, first=4, saves=2) == [0]
    for way in ways:
        ranks, asynchronous, replaced = WAYS[way]
        first = 5 if replaced else 6
        lines.start(0)
        codes = _run(fresh(folder, before), lines, ranks, asynchronous, first)
        assert codes == [0] * ranks, codes
        counts = found[way] = Counter()
        for at in range(1, lines.count + 1, every):
            if time.monotonic() > until:
                counts["not reached"] += 1
                continue
            root = fresh(folder, before)
            lines.start(at)
            codes = _run(root, lines, ranks, asynchronous, first)
            outcome, complaint = _judge(root, codes, first, replaced)
            counts[outcome] += 1
            if complaint:
                wrong.append(f"{way}, MemoryError at line {at} ({lines.where}): {complaint}")
    return found, wrong


def _judge(root: Path, codes: list[int | None], first: int, replaced: bool) -> tuple[str, str]:
    """(what became of it, what is wrong with that)."""
    from benchmarks import small_saves

    if None in codes:
        return "hang", f"exit codes {codes}"
    loaded, passed = small_saves.newest(root)
    outcome = "saved" if not any(codes) else "refused" if loaded < first or replaced else "failed after the commit"
    if passed or loaded < 5:
        return outcome, f"the newest that loads is {loaded}, {passed} passed over"
    if 0 in codes and loaded != first:
        return outcome, f"exit codes {codes}, but {loaded} is the newest"
    if outcome == "refused" and not replaced and small_saves.check(root / "iter_0000005") != 5:
        return outcome, "the checkpoint before was touched"
    if outcome == "refused" and not (root / "iter_0000004").is_dir() and loaded < first:
        return outcome, "an old checkpoint was deleted although the new one does not count"
    return outcome, ""


def _run(root: Path, lines: Lines, ranks: int, asynchronous: bool, first: int, saves: int = 1) -> list[int | None]:
    """Fork `ranks` processes that save; their exit codes, None for one that hangs."""
    store = str(root.with_name("store")) if ranks > 1 else None
    if store and os.path.exists(store):
        os.unlink(store)
    children = []
    for rank in range(ranks):
        child = os.fork()
        if not child:
            _save(root, lines, rank, ranks, store, asynchronous, first, saves)
        children.append(child)
    deadline = time.monotonic() + DEADLINE
    return [_ended(child, deadline) for child in children]


def _ended(child: int, deadline: float) -> int | None:
    while time.monotonic() < deadline:
        pid, status = os.waitpid(child, os.WNOHANG)
        if pid:
            return os.waitstatus_to_exitcode(status)
        time.sleep(0.002)
    os.kill(child, signal.SIGKILL)
    os.waitpid(child, 0)
    return None


def _save(
    root: Path, lines: Lines, rank: int, ranks: int, store: str | None, asynchronous: bool, first: int, saves: int
) -> None:
    """One rank: 0 saved, 1 any error."""
    from benchmarks import small_saves

    code = 1
    os.dup2(os.open(os.devnull, os.O_WRONLY), 2)  # thousands of tracebacks
    try:
        small_saves.join(rank, ranks, store)
        lines.trace()
        small_saves.save_some(root, small_saves.layout(rank, ranks), asynchronous, 2, first, saves)
        code = 0
    except BaseException:
        pass
    finally:
        os._exit(code)


if __name__ == "__main__":
    main()
