"""Memory of the pretokenizer on many samples: a generator's chats to shards, the peak of all processes measured.

    python benchmarks/pretokenize_memory.py --tokenizer tokenizer.model [--samples 10000000] [--folder /big/disk]
    python benchmarks/pretokenize_memory.py --tokenizer tokenizer.model --words 100 --samples 500000

Ten million short chats are about 1.1 GB of JSON lines, which are written first. With --words each chat is that many random words, so
that text is distinct without end and an encoder that remembers words would grow. The aim is to stay within 2 GB.
"""

import argparse
import json
import os
import random
import string
import subprocess
import sys
import time
from pathlib import Path
from tempfile import TemporaryDirectory

ROOT = Path(__file__).resolve().parent.parent


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tokenizer", type=Path, required=True)
    parser.add_argument("--samples", type=int, default=10_000_000)
    parser.add_argument("--words", type=int, default=0, help="random words a chat; default: a short question")
    parser.add_argument("--workers", type=int, default=len(os.sched_getaffinity(0)))
    parser.add_argument("--duplicates", choices=["keep", "exact", "near"], default="keep")
    parser.add_argument("--folder", type=Path, default=None)
    arguments = parser.parse_args()
    with TemporaryDirectory(dir=arguments.folder) as folder:
        data = Path(folder) / "chats.jsonl"
        with data.open("w") as file:
            file.writelines(chat(number, arguments.words) for number in range(arguments.samples))
        print(f"{arguments.samples:,} chats, {data.stat().st_size / 1e9:.2f} GB of JSON lines")
        command = [
            *(sys.executable, "-m", "megatron_ft", "pretokenize", "--input", str(data)),
            *("--output_prefix", f"{folder}/x", "--tokenizer", str(arguments.tokenizer.resolve())),
            *("--workers", str(arguments.workers), "--duplicates", arguments.duplicates),
        ]
        started = time.monotonic()
        process = subprocess.Popen(command, cwd=ROOT, stdout=subprocess.DEVNULL)
        peak = 0
        while process.poll() is None:
            peak = max(peak, memory(process.pid))
            time.sleep(0.2)
        if process.returncode:
            sys.exit(process.returncode)
        seconds = time.monotonic() - started
        counts = json.loads(Path(f"{folder}/x-train-manifest.json").read_text())["counts"]
        print(f"{seconds:.0f} s, {arguments.samples / seconds:,.0f} samples/s, {counts['tokens']:,} training tokens")
        print(f"peak of all processes {peak / 1e9:.2f} GB, {peak / arguments.samples:.0f} bytes a sample (aim: 2 GB)")


def chat(number: int, words: int) -> str:
    answer = f"{number + 1}"
    if words:
        letters = random.Random(number).choices(string.ascii_lowercase, k=9 * words)
        answer = " ".join("".join(letters[at : at + 4 + at % 6]) for at in range(0, len(letters), 9))
    turns = [{"role": "user", "content": f"What is {number} + 1?"}, {"role": "assistant", "content": answer}]
    return json.dumps({"messages": turns}) + "\n"


def memory(process: int) -> int:
    """Proportional memory of a process and its children, in bytes: pages they share count once."""
    import psutil

    total = 0
    try:
        family = [psutil.Process(process), *psutil.Process(process).children(recursive=True)]
    except psutil.NoSuchProcess:
        return 0
    for one in family:
        try:
            total += one.memory_full_info().pss
        except (psutil.Error, AttributeError):
            continue
    return total


if __name__ == "__main__":
    main()
