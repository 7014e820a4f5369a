"""How fast chats become shards, beside what one would use instead, in one run on the same text.

    python benchmarks/pretokenize.py --tokenizer tokenizer.model [--megabytes 10 50] [--workers 2] [--text FOLDER ...]

The text does not repeat: blocks of the sources and documents of the Python packages that are installed here (benchmarks/texts.py), each
once. Three ways, repeated in turn; the best time of each counts:

  ours       the whole command: files read, checked, split, tokenized, roles, shards, statistics on the disk
  original   the Open-Assistant way: every turn encoded one by one in Python, then the whole conversation again, special
             tokens found by searching the text for each of them; JSON lines in, numbers in two files out, one process,
             Python's start and the tokenizer's included
  library    the bare tokenizer library encoding the same strings in batches, on the same cores; in memory

CPU seconds, of all processes together, tell more than the clock where other work shares the machine. The aims are for the clock on two
quiet cores.
"""

import argparse
import json
import os
import resource
import subprocess
import sys
import time
from pathlib import Path
from tempfile import TemporaryDirectory

os.environ.setdefault("OMP_NUM_THREADS", "1")
sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from benchmarks.texts import write

AIMS = {"original": {10: 5.0, 50: 10.0}, "library": {50: 2.5}}  # by megabytes


def main() -> None:
    arguments = parse()
    for megabytes in arguments.megabytes:
        compare(arguments, megabytes)


def compare(arguments: argparse.Namespace, megabytes: int) -> None:
    with TemporaryDirectory(dir=arguments.folder) as folder:
        data = Path(folder) / "chats.jsonl"
        size, texts = write(data, megabytes * 10**6, arguments.text)
        chats = f"{len(texts) // 2:,} chats, {size / 1e6:.0f} MB of text that does not repeat"
        print(f"{chats}, {arguments.workers} cores, {arguments.tokenizer.name}")
        best: dict[str, tuple[float, float]] = {}
        for turn in range(arguments.repeat):
            for name, way in (
                ("ours", lambda turn=turn: ours(arguments, data, Path(folder) / f"out{turn}")),
                ("original", lambda: apart(arguments.tokenizer, data, Path(folder) / "original")),
                ("library", lambda: library(arguments, texts)),
            ):
                before = cpu()
                seconds, tokens = way()
                used = cpu() - before
                print(
                    f"  {name:9}{seconds:7.2f} s  {size / 1e6 / seconds:6.2f} MB/s  {tokens / 1e6 / seconds:5.2f} Mtok/s  "
                    f"{used:7.2f} CPU s",
                    flush=True,
                )
                best[name] = tuple(map(min, best.get(name, (seconds, used)), (seconds, used)))
    for other, aims in AIMS.items():
        clock, used = (there / here for there, here in zip(best[other], best["ours"], strict=True))
        aim = f" (aim: at least {aims[megabytes]:g} by the clock)" if megabytes in aims else ""
        print(f"ours against the {other}: {clock:.2f} x by the clock, {used:.2f} x by CPU seconds{aim}", flush=True)


def cpu() -> float:
    """CPU seconds of this process and of those that it waited for."""
    return sum(sum(resource.getrusage(who)[:2]) for who in (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN))


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tokenizer", type=Path, required=True)
    parser.add_argument("--text", type=Path, nargs="+", help="folders of text; default: this Python's packages")
    parser.add_argument("--megabytes", type=int, nargs="+", default=[10, 50])
    parser.add_argument("--workers", type=int, default=len(os.sched_getaffinity(0)))
    parser.add_argument("--repeat", type=int, default=2)
    parser.add_argument("--folder", type=Path, default=None, help="where to write; needs twice the text's size")
    return parser.parse_args()


def ours(arguments: argparse.Namespace, data: Path, out: Path) -> tuple[float, int]:
    """The command in a process of its own, Python's start and imports included."""
    command = [
        *(sys.executable, "-m", "megatron_ft", "pretokenize", "--input", str(data), "--output_prefix", str(out / "x")),
        *("--tokenizer", str(arguments.tokenizer), "--workers", str(arguments.workers), "--val_split", "0.01"),
    ]
    started = time.monotonic()
    subprocess.run(command, check=True, stdout=subprocess.DEVNULL, cwd=Path(__file__).resolve().parent.parent)
    seconds = time.monotonic() - started
    counts = [json.loads((out / f"x-{split}-manifest.json").read_text())["counts"] for split in ("train", "val")]
    return seconds, sum(count["tokens"] for count in counts)


def apart(path: Path, data: Path, out: Path) -> tuple[float, int]:
    """original() in a process of its own."""
    script = (
        f"import sys; sys.path.insert(0, {str(Path(__file__).parent)!r}); from pretokenize import original; original()"
    )
    started = time.monotonic()
    done = subprocess.run([sys.executable, "-c", script, path, data, out], check=True, stdout=subprocess.PIPE)
    return time.monotonic() - started, int(done.stdout)


def original() -> None:
    """Encode each turn alone for its length and role; then the conversation again for its tokens. Print their number."""
    import numpy as np

    path, data, out = map(Path, sys.argv[1:])
    encode, tokens = encoder(path), 0
    with data.open() as lines, open(f"{out}-text.bin", "wb") as text, open(f"{out}-role.bin", "wb") as role:
        for line in lines:
            turns = [
                f"<|im_start|>{message['role']}\n{message['content']}<|im_end|>\n"
                for message in json.loads(line)["messages"]
            ]
            roles: list[int] = []
            for number, turn in enumerate(turns):
                roles.extend([number % 2] * len(encode(turn)))
            ids = encode("".join(turns))
            assert len(ids) == len(roles)
            text.write(np.array(ids, np.uint16 if max(ids) < 65536 else np.int32).tobytes())
            role.write(np.array(roles, np.uint16).tobytes())
            tokens += len(ids)
    print(tokens)


def library(arguments: argparse.Namespace, said: list[str]) -> tuple[float, int]:
    """The strings between control tokens, the whole batch at once. said: questions and answers in turn."""
    texts = []
    for number, text in enumerate(said):
        texts += (f"{('user', 'assistant')[number % 2]}\n{text}", "\n")
    if arguments.tokenizer.suffix == ".model":
        import sentencepiece

        model = sentencepiece.SentencePieceProcessor(model_file=str(arguments.tokenizer))
        started = time.monotonic()
        found = model.encode(texts, return_type="numpy", num_threads=arguments.workers)
        return time.monotonic() - started, sum(map(len, found))
    import tokenizers

    os.environ["RAYON_NUM_THREADS"] = str(arguments.workers)
    fast = tokenizers.Tokenizer.from_file(str(arguments.tokenizer))
    started = time.monotonic()
    found = fast.encode_batch_fast(texts, add_special_tokens=False)
    return time.monotonic() - started, sum(len(one.ids) for one in found)


def encoder(path: Path):
    """Text to ids, special tokens looked for in the text as that tool's tokenizer does for a SentencePiece model."""
    if path.suffix != ".model":
        import tokenizers

        fast = tokenizers.Tokenizer.from_file(str(path))
        fast.add_special_tokens(["<|im_start|>", "<|im_end|>"])
        return lambda text: fast.encode(text, add_special_tokens=False).ids
    import sentencepiece

    model = sentencepiece.SentencePieceProcessor(model_file=str(path))
    names = ["<CLS>", "<SEP>", "<EOD>", "<MASK>", "<PAD>", "<|im_start|>", "<|im_end|>"]
    special = {"<s>": 1, "</s>": 2} | {name: model.get_piece_size() + i for i, name in enumerate(names)}

    def encode(text: str) -> list[int]:
        ids: list[int] = []
        at = 0
        while True:
            places = {name: place for name in special if (place := text.find(name, at)) >= 0}
            if not places:
                break
            name = min(places, key=places.__getitem__)
            ids.extend(model.encode(text[at : places[name]]))
            ids.append(special[name])
            at = places[name] + len(name)
        ids.extend(model.encode(text[at:]))
        return ids

    return encode


if __name__ == "__main__":
    main()
