"""Lets one of the ranks of a running job fail, in one of five ways at a random moment, on a busy machine: is the cause named first, with
its rank, and how long does it take?

    python benchmarks/first_errors.py [--errors 200] [--ranks 4] [--load 10] [--seed 0] [--seconds 1e9]

    raise     a bug in one rank                 memory   an allocation of 4 PB, which the system refuses
    kill      SIGKILL                           disk     the first fsync of a save gives ENOSPC
    stop      SIGSTOP; noticed when the others' patience ends (--distributed_timeout_minutes, 9 s here), which is not counted

The ranks are started by finetune's own launcher, forked from one process that has the imports done. --load: so many processes do nothing
but compute meanwhile. Right: exit code 1 (2 for the disk), the first error line names the cause and its rank, no other error line is
printed, and all processes are gone within 10 s of the error.
"""

from __future__ import annotations

import argparse
import contextlib
import ctypes
import errno
import os
import random
import signal
import sys
import time
from collections import Counter
from pathlib import Path
from tempfile import TemporaryDirectory

import psutil

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from benchmarks import forked_jobs

PATIENCE = 9.0
"""Seconds of --distributed_timeout_minutes."""
IN_TIME = 10.0
"""Seconds from the error, or from the end of the patience, until all are gone."""
EXPECTED = {
    "raise": (1, "error: rank {rank} failed:"), "memory": (1, "error: rank {rank} failed:"), "kill": (1, "rank {rank} (process "),
    "stop": (1, "rank {rank} (process "), "disk": (2, "no space left on device"),
}  # fmt: skip
"""Exit code, and what the first error line has in it. Of a full disk that is the file, whose name tells the rank that wrote it."""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    for name, default in {"errors": 200, "ranks": 4, "load": 10, "seed": 0}.items():
        parser.add_argument(f"--{name}", type=int, default=default)
    parser.add_argument("--seconds", type=float, default=1e9, help="begin nothing new after so many")
    given = parser.parse_args()
    with TemporaryDirectory() as folder, busy(given.load):
        forked_jobs.prepare(Path(folder))
        found, seconds, wrong = campaign(Path(folder), given.errors, given.ranks, given.seed, given.seconds)
    for what, count in sorted(found.items()):
        taken = sorted(seconds[what])
        print(
            f"{what:7} {count:4} times, all gone after {taken[len(taken) // 2]:4.1f} s (median), {taken[-1]:4.1f} s at most"
        )
    print("\n".join(wrong))
    print(f"{sum(found.values())} first errors, {len(wrong)} wrong; load {os.getloadavg()[0]:.1f} at the end")
    sys.exit(bool(wrong))


@contextlib.contextmanager
def busy(processes: int):
    """So many processes that compute."""
    pids = []
    for _ in range(processes):
        pid = os.fork()
        if not pid:
            _die_with_parent()
            while True:
                sum(range(10**6))
        pids.append(pid)
    try:
        yield
    finally:
        for pid in pids:
            os.kill(pid, signal.SIGKILL)
            os.waitpid(pid, 0)


def campaign(folder: Path, errors: int, ranks: int, seed: int, seconds: float = 1e9):
    """(how often each kind, seconds that each took, what was wrong). folder: as forked_jobs.prepare made it."""
    rng, until = random.Random(seed), time.monotonic() + seconds
    found, taken, wrong = Counter(), {kind: [] for kind in EXPECTED}, []
    while found.total() < errors and time.monotonic() < until:
        kind, rank = rng.choice(list(EXPECTED)), rng.randrange(ranks)
        tp = rng.choice([size for size in (1, 2) if ranks % size == 0])
        took, fault = one(folder, kind, rank, ranks, tp, rng.randrange(2, 6), rng.random() * 0.05)
        found[kind] += 1
        taken[kind].append(took)
        if fault:
            wrong.append(f"error {found.total()}, {kind} on rank {rank} of TP{tp}: {fault}")
            print(wrong[-1], flush=True)
        if found.total() % 20 == 0:
            print(f"{found.total()} errors, {len(wrong)} wrong", flush=True)
    return found, taken, wrong


def one(folder: Path, kind: str, rank: int, ranks: int, tp: int, step: int, late: float) -> tuple[float, str | None]:
    """(seconds until all were gone, what was wrong). step: in which it happens; late: seconds after its beginning."""
    mark, out, err = folder / "mark", folder / "out", folder / "err"
    mark.unlink(missing_ok=True)
    pid = os.fork()
    if not pid:
        _launch(folder, kind, rank, ranks, tp, step, late)
    deadline = time.monotonic() + 300
    members: dict[int, psutil.Process] = {}
    while (ended := os.waitpid(pid, os.WNOHANG))[0] == 0:
        with contextlib.suppress(psutil.Error):
            members.update({process.pid: process for process in psutil.Process(pid).children(recursive=True)})
        if time.monotonic() > deadline:
            os.kill(pid, signal.SIGKILL)
            os.waitpid(pid, 0)
            return 300.0, f"hangs; said {err.read_text()[-300:]!r}"
        time.sleep(0.02)
    psutil.wait_procs(members.values(), 30)
    if not mark.exists():
        return 0.0, f"ended before the error: {err.read_text()[-300:]!r} {out.read_text()[-200:]!r}"
    took = time.time() - mark.stat().st_mtime - (PATIENCE if kind == "stop" else 0)
    code, words = EXPECTED[kind]
    said = [line for line in err.read_text().splitlines() if "error:" in line and line.startswith("megatron-ft")]
    ended_with = os.waitstatus_to_exitcode(ended[1])
    if ended_with != code or len(said) != 1 or words.format(rank=rank) not in said[0].lower():
        return took, f"exit code {ended_with}, said {said}"
    return took, None if took < IN_TIME else f"took {took:.1f} s"


def _launch(folder: Path, kind: str, rank: int, ranks: int, tp: int, step: int, late: float) -> None:
    """In a forked process: the command, from its words on. Does not return."""
    _die_with_parent()
    code = 1
    try:
        for number, name in ((1, "out"), (2, "err")):
            os.dup2(os.open(folder / name, os.O_WRONLY | os.O_CREAT | os.O_TRUNC), number)
        _arm(folder / "mark", kind, rank, step, late)
        from megatron_ft.__main__ import main as command

        words = [
            "finetune",
            "--load",
            folder / "checkpoint",
            "--data_path",
            folder / "chats-train",
            "--train_iters",
            10**6,
        ]
        words += [
            "--seq_length",
            64,
            "--log_interval",
            10**6,
            "--no_report",
            "--nproc_per_node",
            ranks,
            "--global_batch_size",
            4,
        ]
        words += ["--tensor_model_parallel_size", tp, "--distributed_timeout_minutes", PATIENCE / 60]
        if kind == "disk":
            words += ["--save", folder / f"run-{time.monotonic_ns()}", "--save_interval", step]
        code = command([str(word) for word in words])
    except SystemExit as stop:
        code = stop.code
    except BaseException as error:
        print(f"harness: {type(error).__name__}: {error}", file=sys.stderr)
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code)


def _arm(mark: Path, kind: str, rank: int, step: int, late: float) -> None:
    from megatron_ft.training import step as steps

    update, fsync, calls = steps.update, os.fsync, []

    def is_victim() -> bool:
        return os.environ.get("RANK") == str(rank)

    def fail(optimizer):
        calls.append(1)
        if is_victim() and len(calls) == step and kind != "disk":
            time.sleep(late)
            mark.touch()
            _fail(kind)
        return update(optimizer)

    def full(file):
        if is_victim() and kind == "disk":
            mark.touch(exist_ok=True)
            raise OSError(errno.ENOSPC, "No space left on device")
        return fsync(file)

    steps.update, os.fsync = fail, full


def _fail(kind: str) -> None:
    import torch

    if kind == "raise":
        raise RuntimeError("the cat sat on it")
    if kind == "memory":
        torch.empty(1 << 50)
    os.kill(os.getpid(), {"kill": signal.SIGKILL, "stop": signal.SIGSTOP}[kind])


def _die_with_parent() -> None:
    ctypes.CDLL(None).prctl(1, signal.SIGKILL)  # PR_SET_PDEATHSIG


if __name__ == "__main__":
    main()
