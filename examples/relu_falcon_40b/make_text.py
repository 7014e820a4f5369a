"""Real text for a small model, from what is on every machine: this project's documentation and Python's docstrings.

python make_text.py OUT.jsonl [FILE...]

FILE...: other text files to use in their place. OUT.jsonl has a line {"text": ...} for each file. Environment: CHARACTERS (the largest
number in all).
"""

from __future__ import annotations

import ast
import json
import os
import random
import sys
import sysconfig
import warnings
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path

from megatron_ft.files import atomic_file

ROOT = Path(__file__).resolve().parents[2]
SEED, LEAST = 1, 200
"""Of the order of the files; characters of a text."""


def texts(files: Sequence[Path]) -> Iterator[str]:
    """Yield the content of the files, or by default documentation and docstrings, in an order that depends on their names alone."""
    sources = sorted(files or [*documents(), *Path(sysconfig.get_path("stdlib")).rglob("*.py")])
    random.Random(SEED).shuffle(sources)
    for source in sources:
        text = source.read_text(encoding="utf-8", errors="replace")
        text = docstrings(text) if source.suffix == ".py" and not files else text
        if len(text) >= LEAST:
            yield text


def documents() -> list[Path]:
    """Return the pages of this project."""
    return [
        path
        for folder in ("docs", "examples", ".")
        for path in (ROOT / folder).glob("**/*.md" if folder != "." else "*.md")
    ]


def docstrings(code: str) -> str:
    """Return the docstrings of a module and of what it defines."""
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            tree = ast.parse(code)
    except (SyntaxError, ValueError):  # tests of Python's own parser
        return ""
    kinds = (ast.Module, ast.ClassDef, ast.FunctionDef, ast.AsyncFunctionDef)
    found = (ast.get_docstring(node) for node in ast.walk(tree) if isinstance(node, kinds))
    return "\n\n".join(text for text in found if text)


def write(target: Path, all_texts: Iterable[str], most: int) -> tuple[int, int]:
    """Write texts of `most` characters in all. Return (texts, characters)."""
    count, characters = 0, 0
    target.parent.mkdir(parents=True, exist_ok=True)
    with atomic_file(target, "w") as file:
        for text in all_texts:
            if characters >= most:
                break
            piece = text[: most - characters]
            file.write(json.dumps({"text": piece}) + "\n")
            count, characters = count + 1, characters + len(piece)
    return count, characters


if __name__ == "__main__":
    if len(sys.argv) < 2:
        sys.exit(__doc__)
    count, characters = write(
        Path(sys.argv[1]), texts([Path(name) for name in sys.argv[2:]]), int(os.environ.get("CHARACTERS", 10**9))
    )
    print(f"{count} texts, {characters:,} characters -> {sys.argv[1]}")
