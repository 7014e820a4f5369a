"""Lets every single file operation of a save fail, one after another: nothing old is lost, and every rank ends with an error.

    python benchmarks/io_faults.py [--seconds 1e9]

SQLite's habit: first a save is counted, then for every n the n-th open, read, write, fsync, rename, mkdir or unlink below the
folder fails: with EIO, with ENOSPC, with ENOSPC from then on (a disk that stays full); or a write takes only half of what it is
given. Saves here, by a background process, by two ranks of which either may meet the fault, and over an older checkpoint of the
same iteration, whose place is taken. A save may only succeed, with a checkpoint that is whole to the bit, or fail on all ranks with
what was there before.

Needs a C compiler: a library of forty lines stands between Python, torch and the system (io_faults.c).
"""

from __future__ import annotations

import argparse
import ctypes
import errno
import os
import shutil
import subprocess
import sys
import time
from collections import Counter
from pathlib import Path
from tempfile import TemporaryDirectory

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

KINDS = {
    "EIO": (errno.EIO, 0),
    "ENOSPC": (errno.ENOSPC, 0),
    "ENOSPC from then on": (errno.ENOSPC, 1),
    "short write": (-1, 0),
}
WAYS = {
    "here": (1, False, False),
    "in the background": (1, True, False),
    "in the place of an older one": (1, False, True),
    "two ranks": (2, False, False),
}
"""Ranks, background writers, whether the iteration was saved before."""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seconds", type=float, default=1e9, help="stop after so many")
    parser.add_argument("--every", type=int, default=1, help="only each such operation")
    parser.add_argument("--ways", nargs="*", default=list(WAYS))
    arguments = parser.parse_args()
    preload()
    with TemporaryDirectory() as folder:
        found, wrong = campaign(Path(folder), arguments.ways, arguments.every, arguments.seconds)
    for (way, kind), counts in found.items():
        print(f"{way}, {kind}: " + ", ".join(f"{what} {count}" for what, count in counts.items()))
    total = sum(sum(v for k, v in counts.items() if k != "wrong") for counts in found.values())
    print(f"faults: {total:,}, wrong: {len(wrong)}")
    print("\n".join(wrong[:20]))
    sys.exit(bool(wrong))


def preload() -> None:
    """Start this very program again with the library in front of the system's, unless it is."""
    if "io_faults" in os.environ.get("LD_PRELOAD", ""):
        return
    folder = TemporaryDirectory()
    library = Path(folder.name) / "io_faults.so"
    build(library)
    environment = os.environ | {"LD_PRELOAD": str(library)}
    done = subprocess.run([sys.executable, *sys.argv], env=environment)
    folder.cleanup()
    sys.exit(done.returncode)


def build(library: Path) -> None:
    source = Path(__file__).with_suffix(".c")
    subprocess.run(["cc", "-shared", "-fPIC", "-O1", "-o", library, source, "-ldl"], check=True)


def campaign(folder: Path, ways: list[str], every: int = 1, seconds: float = 1e9) -> tuple[dict, list[str]]:
    """((way, kind) -> what became of the faults, what went wrong). Only below the library."""
    until = time.monotonic() + seconds
    found: dict[tuple[str, str], Counter] = {}
    wrong: list[str] = []
    before = folder / "before"
    from benchmarks import small_saves  # noqa: F401 - once, here: the forked ranks have it then

    _run(before, 1, False, first=4, saves=2)
    for way in ways:
        ranks, asynchronous, replaced = WAYS[way]
        first = 5 if replaced else 6
        for kind, (number, lasting) in KINDS.items():
            operations = _count(folder, before, ranks, asynchronous, first, number)
            counts = found[way, kind] = Counter()
            for at in range(1, operations + 1, every):
                if time.monotonic() > until:
                    counts["not reached"] += 1
                    continue
                root = fresh(folder, before)
                fault = (at, number, lasting)
                codes, hit = _run(root, ranks, asynchronous, first, saves=1, fault=fault)
                outcome, complaint = _judge(root, codes, first, replaced)
                counts[outcome] += 1
                if complaint:
                    wrong.append(f"{way}, {kind} at operation {at} ({hit}): {complaint}")
    return found, wrong


def fresh(folder: Path, before: Path) -> Path:
    root = folder / "root"
    shutil.rmtree(root, ignore_errors=True)
    shutil.copytree(before, root)
    return root


def _count(folder, before, ranks, asynchronous, first, number) -> int:
    root = fresh(folder, before)
    codes, operations = _run(root, ranks, asynchronous, first, saves=1, fault=(0, number, 0), counting=True)
    assert codes == [0] * ranks, codes
    return operations


def _judge(root: Path, codes: list[int], first: int, replaced: bool) -> tuple[str, str]:
    """(what became of it, what is wrong with that)."""
    from benchmarks import small_saves

    outcome = "saved" if not any(codes) else "refused"
    if len(set(codes)) > 1 or not set(codes) <= {0, 2}:
        return outcome, f"exit codes {codes}"
    loaded, passed = small_saves.newest(root)
    if passed or loaded < 5:
        return outcome, f"the newest that loads is {loaded}, {passed} passed over"
    if outcome == "saved" and loaded != first:
        return outcome, f"said to be saved, but {loaded} is the newest"
    if outcome == "refused" and not replaced and small_saves.check(root / "iter_0000005") != 5:
        return outcome, "the checkpoint before was touched"
    if outcome == "refused" and not (root / "iter_0000004").is_dir() and loaded < first:
        return outcome, "an old checkpoint was deleted although the new one does not count"
    return outcome, ""


def _run(root, ranks, asynchronous, first, saves, fault=None, counting=False):
    """Fork `ranks` processes that save; (exit codes, the operation that failed, or their number where they are counted)."""
    library = ctypes.CDLL(None)
    library.io_faults_hit.restype = ctypes.c_char_p
    library.io_faults_count.restype = ctypes.c_long
    library.io_faults_disarm()
    store = str(root.with_name("store")) if ranks > 1 else None
    if store and os.path.exists(store):
        os.unlink(store)
    if fault:
        at, number, lasting = fault
        library.io_faults_arm(os.fsencode(root) + b"/", ctypes.c_long(at), number, lasting)
    children = []
    for rank in range(ranks):
        child = os.fork()
        if not child:
            _save(root, rank, ranks, store, asynchronous, first, saves)
        children.append(child)
    codes = [os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) for child in children]
    library.io_faults_disarm()
    return codes, library.io_faults_count() if counting else library.io_faults_hit().decode()


def _save(root, rank, ranks, store, asynchronous, first, saves) -> None:
    """One rank: 0 saved, 2 refused in words for the user, 1 anything else."""
    from benchmarks import small_saves
    from megatron_ft.errors import UserError

    code = 1
    try:
        small_saves.join(rank, ranks, store)
        small_saves.save_some(root, small_saves.layout(rank, ranks), asynchronous, 2, first, saves)
        code = 0
    except (UserError, OSError):
        code = 2
    except BaseException as error:
        print(f"  {type(error).__name__}: {error}", flush=True)
    finally:
        os._exit(code)


if __name__ == "__main__":
    main()
