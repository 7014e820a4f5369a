"""Run a command and say how long it took and how much memory it and its processes needed at most: measure.py COMMAND..."""

import subprocess
import sys
import time

import psutil

EVERY = 1.0  # seconds between looks


def held(pid: int) -> int:
    """Bytes of a process and all below it, what they share counted once (PSS)."""
    total = 0
    try:
        processes = [psutil.Process(pid), *psutil.Process(pid).children(recursive=True)]
    except psutil.Error:
        return 0
    for process in processes:
        try:
            total += process.memory_full_info().pss
        except psutil.Error:
            continue  # it has ended meanwhile
    return total


def main() -> int:
    started, most = time.monotonic(), 0
    command = subprocess.Popen(sys.argv[1:])
    while command.poll() is None:
        most = max(most, held(command.pid))
        time.sleep(EVERY)
    seconds = int(time.monotonic() - started)
    print(
        f"{seconds // 60}:{seconds % 60:02d} minutes, at most {most / 1e9:.1f} GB of memory, exit code {command.returncode}"
    )
    return command.returncode


if __name__ == "__main__":
    sys.exit(main())
