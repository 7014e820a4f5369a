"""Kills the pretokenizer at random moments and starts it again: no half shards, and in the end the same bytes.

    python benchmarks/kill_pretokenizer.py [--kills 1000] [--workers 1]

Each round: a run is killed (SIGKILL) at a moment between its start and a little after its end, now and then twice in a row. What
then lies under final names is judged, and a run without any flag has to finish with the bytes of a run that nobody killed and to
leave nothing else in the folder. Plain runs, mixes (which spool) and --overwrite over finished shards take turns.

Runs are forked from one process with the imports done, so that a second holds several of them.
"""

from __future__ import annotations

import argparse
import contextlib
import importlib
import json
import os
import random
import shutil
import signal
import sys
import time
from collections import Counter
from pathlib import Path
from tempfile import TemporaryDirectory

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from megatron_ft.data.manifest import manifest_path
from megatron_ft.data.shards import open_shards
from megatron_ft.errors import UserError

KINDS = ("plain", "mix", "overwrite")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--kills", type=int, default=1000)
    parser.add_argument("--workers", type=int, default=1)
    parser.add_argument("--chats", type=int, default=3000)
    parser.add_argument("--seconds", type=float, default=1e9, help="stop after so many")
    arguments = parser.parse_args()
    with TemporaryDirectory() as folder:
        found = campaign(Path(folder), arguments.kills, arguments.workers, arguments.chats, seconds=arguments.seconds)
    print(", ".join(f"{what}: {count:,}" for what, count in found.items()))


def campaign(
    folder: Path, kills: int, workers: int = 1, chats: int = 3000, seed: int = 0, seconds: float = 1e9
) -> Counter[str]:
    """Counts of what the kills met. Raises AssertionError where something half-done was taken for finished."""
    rng, found = random.Random(seed), Counter[str]()
    make_input(folder, chats)
    clean = {kind: finished(folder, kind, workers) for kind in KINDS}
    until = time.monotonic() + seconds
    while found["killed"] < kills and time.monotonic() < until:
        kind = KINDS[found["rounds"] % len(KINDS)]
        found["rounds"] += 1
        out = folder / "out"
        if kind == "overwrite":
            shutil.copytree(clean[kind][0], out)
        for _ in range(rng.choice((1, 1, 2))):
            moment = rng.uniform(rng.choice((0, 0.75)), 1.05)  # the end, where files get their names, more often
            in_time = start(folder, out, kind, workers, moment * clean[kind][1])
            found["killed" if in_time else "too late"] += 1
            found[judge(out, clean[kind][0])] += 1
            if found["killed"] == kills:
                break
        complete = manifest_path(out / "x-train").exists()
        started = time.monotonic()
        code = start(folder, out, kind, workers)
        assert code == 0, (kind, code)  # also where the shards are whole already
        if kind == "overwrite" or not complete:  # other work on the machine changes how long a run takes
            clean[kind] = clean[kind][0], time.monotonic() - started
        assert content(out) == content(clean[kind][0]), (kind, sorted(content(out)), sorted(content(clean[kind][0])))
        shutil.rmtree(out)
    return found


def make_input(folder: Path, chats: int) -> None:
    from tests.data.helpers import sentencepiece_file

    sentencepiece_file(folder)
    with (folder / "chats.jsonl").open("w") as file:
        for i in range(chats):
            said = [{"role": "user", "content": f"what is {i}?"}, {"role": "assistant", "content": f"{i} is a number"}]
            file.write(json.dumps({"messages": said}) + "\n")
    entry = "messages: {input_file_path: chats.jsonl, val_split: 0.1, share: 1}"
    (folder / "configs").mkdir()
    mix = (
        f"mix:\n  datasets:\n    - {entry}\n    - {entry}\n  mix_by: tokens\n  output_dir: out\n  filename_prefix: x\n"
    )
    (folder / "configs/mix.yaml").write_text(mix)


def finished(folder: Path, kind: str, workers: int) -> tuple[Path, float]:
    """(folder of a run that nobody killed, its seconds)."""
    start(folder, folder / "out", kind, workers)  # warm
    shutil.rmtree(folder / "out")
    started = time.monotonic()
    assert start(folder, folder / "out", kind, workers) == 0
    seconds = time.monotonic() - started
    (folder / "out").rename(folder / f"clean-{kind}")
    return folder / f"clean-{kind}", seconds


def start(folder: Path, out: Path, kind: str, workers: int, kill_after: float | None = None) -> int | bool:
    """Run the command in a fork; its exit code, or with kill_after whether it was killed before it ended."""
    child = os.fork()
    if child == 0:
        code = 70
        try:
            os.setpgid(0, 0)
            os.chdir(folder)
            quiet = os.open(os.devnull, os.O_WRONLY)
            os.dup2(quiet, 1)
            os.dup2(quiet, 2)
            code = run_command(out, kind, workers)
        finally:
            os._exit(code)
    if kill_after is None:
        return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
    time.sleep(kill_after)
    with contextlib.suppress(ProcessLookupError):
        os.kill(child, signal.SIGKILL)  # the run alone; its workers have to end by themselves
    return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == -signal.SIGKILL


def run_command(out: Path, kind: str, workers: int) -> int:
    from megatron_ft.config.cli import run_script
    from tools.pretokenizer.pretokenize import COMMAND, run

    words = ["--workers", str(workers)]
    if kind == "mix":
        words += ["--config_dir", "configs", "--configs", "mix", "--vocab_file", "tokenizer.model"]
    else:
        words += ["--input", "chats.jsonl", "--tokenizer", "tokenizer.model", "--output_prefix", "out/x"]
    return run_script(COMMAND, run, [*words, *(["--overwrite"] if kind == "overwrite" else [])])


def judge(out: Path, clean: Path) -> str:
    """What a killed run left under final names: nothing that opens, or what a whole run leaves."""
    try:
        open_shards(out / "x-train", verify=True)
    except UserError:
        return "nothing that opens"
    have, whole = content(out), content(clean)
    assert all(have.get(name) == data for name, data in whole.items()), "the training split opens beside other files"
    return "finished before the kill, or not begun"


def content(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir()} if folder.is_dir() else {}


if __name__ == "__main__":
    # Everything a run imports is here before the first fork.
    for name in ("sentencepiece", "xxhash", "orjson", "tools.pretokenizer.pretokenize"):
        importlib.import_module(name)
    main()
