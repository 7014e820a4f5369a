"""Instruction data that does not repeat, from what is installed anywhere: the sources and documents of Python packages.

Each answer is a top-level block of a file, each question names the file and the block's first line. A block that came before, in
whatever file, is left out. Files are taken in an order that mixes packages, the same each time.
"""

import hashlib
import json
import re
import sysconfig
from collections.abc import Iterator, Sequence
from pathlib import Path

ENDINGS = (".py", ".pyi", ".md", ".rst", ".txt")
SHORTEST, LONGEST = 40, 6000  # characters of a block
_blocks = re.compile(r"\n\n+(?=\S)").split


def folders() -> list[Path]:
    """Return where Python's own library and the installed packages lie."""
    paths = sysconfig.get_paths()
    return [Path(paths[name]) for name in ("stdlib", "purelib") if Path(paths[name]).is_dir()]


def pairs(places: Sequence[Path] | None = None) -> Iterator[tuple[str, str]]:
    """Yield (question, answer), none of them twice. places: folders, those of this Python if not given."""
    seen: set[bytes] = set()
    for root, path in _files(places or folders()):
        for block in _blocks(path.read_text(encoding="utf-8", errors="ignore")):
            block = block.strip("\n")
            mark = hashlib.blake2b(block.encode(), digest_size=12).digest()
            if SHORTEST <= len(block) <= LONGEST and mark not in seen:
                seen.add(mark)
                yield f"{path.relative_to(root)}: write what begins with {block.splitlines()[0][:120]}", block


def write(path: Path, size: int, places: Sequence[Path] | None = None) -> tuple[int, list[str]]:
    """Write chats of `size` bytes of text as JSON lines of messages. Return the bytes and the texts. Fewer bytes are an error."""
    texts, so_far = [], 0
    with path.open("w", encoding="utf-8") as file:
        for question, answer in pairs(places):
            chat = [{"role": "user", "content": question}, {"role": "assistant", "content": answer}]
            file.write(json.dumps({"messages": chat}, ensure_ascii=False) + "\n")
            texts += (question, answer)
            so_far += len(question.encode()) + len(answer.encode())
            if so_far >= size:
                return so_far, texts
    raise SystemExit(f"only {so_far:,} bytes of text that does not repeat are installed here; give --text FOLDER")


def _files(places: Sequence[Path]) -> list[tuple[Path, Path]]:
    found = {
        path.resolve(): (root, path)
        for root in places
        for path in root.rglob("*")
        if path.suffix in ENDINGS and path.is_file()
    }
    return sorted(found.values(), key=lambda pair: hashlib.blake2b(str(pair[1].relative_to(pair[0])).encode()).digest())
