"""How fast chats become shards, beside what one would use instead, in one run on the same text.

    python benchmarks/pretokenize.py --tokenizer tokenizer.model --input instructions.json [--megabytes 100] [--workers 2]

Three ways, each with its own fresh start, repeated in turn; the best time of each counts:

  ours       the whole command: files read, checked, split, tokenized, roles, shards, statistics on the disk
  original   the Open-Assistant way: every turn encoded one by one in Python, then the whole conversation again, special
             tokens found by searching the text for each of them; JSON lines in, numbers in two files out, one process
  library    the bare tokenizer library encoding the same strings in batches, on the same cores; in memory

CPU seconds, of all processes together, tell more than the clock where other work shares the machine.

--input: a JSON array or JSON lines with instruction and output, repeated with numbers until there are enough of them.
"""

import argparse
import json
import os
import resource
import sys
import time
from pathlib import Path
from tempfile import TemporaryDirectory

os.environ.setdefault("OMP_NUM_THREADS", "1")
sys.path.insert(0, str(Path(__file__).resolve().parent.parent))


def main() -> None:
    arguments = parse()
    with TemporaryDirectory(dir=arguments.folder) as folder:
        chats = make_chats(arguments.input, arguments.megabytes << 20)
        data = Path(folder) / "chats.jsonl"
        with data.open("w") as file:
            file.writelines(json.dumps({"messages": chat}, ensure_ascii=False) + "\n" for chat in chats)
        size = sum(len(message["content"].encode()) for chat in chats for message in chat)
        print(
            f"{len(chats):,} chats, {size / 1e6:.0f} MB of text, {arguments.workers} cores, {arguments.tokenizer.name}"
        )
        best: dict[str, tuple[float, float]] = {}
        for turn in range(arguments.repeat):
            for name, way in (
                ("ours", lambda turn=turn: ours(arguments, data, Path(folder) / f"out{turn}")),
                ("original", lambda: original(arguments.tokenizer, data, Path(folder) / "original")),
                ("library", lambda: library(arguments, chats)),
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
    for other, aim in (("original", 5), ("library", 0.85)):
        clock, used = (there / here for there, here in zip(best[other], best["ours"], strict=True))
        print(
            f"ours against the {other}: {clock:.2f} x by the clock, {used:.2f} x by CPU seconds (aim: at least {aim})"
        )


def cpu() -> float:
    """CPU seconds of this process and of those that it waited for."""
    return sum(sum(resource.getrusage(who)[:2]) for who in (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN))


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tokenizer", type=Path, required=True)
    parser.add_argument("--input", type=Path, required=True)
    parser.add_argument("--megabytes", type=int, default=100)
    parser.add_argument("--workers", type=int, default=len(os.sched_getaffinity(0)))
    parser.add_argument("--repeat", type=int, default=2)
    parser.add_argument("--folder", type=Path, default=None, help="where to write; needs twice the text's size")
    return parser.parse_args()


def make_chats(path: Path, size: int) -> list[list[dict[str, str]]]:
    from tools.pretokenizer.lines import records

    rows = [record for _, record in records(path)]
    chats, so_far, number = [], 0, 0
    while so_far < size:
        row = rows[number % len(rows)]
        question = f"{number}: {row['instruction']}"
        chats.append([{"role": "user", "content": question}, {"role": "assistant", "content": row["output"]}])
        so_far += len(question.encode()) + len(row["output"].encode())
        number += 1
    return chats


def ours(arguments: argparse.Namespace, data: Path, out: Path) -> tuple[float, int]:
    """The command in a process of its own, Python's start and imports included."""
    import subprocess

    command = [
        *(sys.executable, "-m", "megatron_ft", "pretokenize", "--input", str(data), "--output_prefix", str(out / "x")),
        *("--tokenizer", str(arguments.tokenizer), "--workers", str(arguments.workers), "--val_split", "0.01"),
    ]
    started = time.monotonic()
    subprocess.run(command, check=True, stdout=subprocess.DEVNULL, cwd=Path(__file__).resolve().parent.parent)
    seconds = time.monotonic() - started
    counts = [json.loads((out / f"x-{split}-manifest.json").read_text())["counts"] for split in ("train", "val")]
    return seconds, sum(count["tokens"] for count in counts)


def original(path: Path, data: Path, out: Path) -> tuple[float, int]:
    """Each turn encoded alone for its length and role; then the conversation again for its tokens."""
    import numpy as np

    encode = encoder(path)
    started, tokens = time.monotonic(), 0
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
            text.write(np.array(ids, np.uint16).tobytes())
            role.write(np.array(roles, np.uint16).tobytes())
            tokens += len(ids)
    return time.monotonic() - started, tokens


def library(arguments: argparse.Namespace, chats: list[list[dict[str, str]]]) -> tuple[float, int]:
    """The strings between control tokens, the whole batch at once."""
    texts = []
    for chat in chats:
        for message in chat:
            texts += (f"{message['role']}\n{message['content']}", "\n")
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
