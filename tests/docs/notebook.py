"""Run a notebook without Jupyter: its code cells in one Python process, lines with `!` in a shell.

`python -m tests.docs.notebook NOTEBOOK.ipynb` runs it in an empty folder and stores what the cells print in it.
"""

import ast
import contextlib
import io
import json
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any


def read(path: Path) -> dict[str, Any]:
    return json.loads(path.read_text(encoding="utf-8"))


def code_cells(notebook: dict[str, Any]) -> list[dict[str, Any]]:
    return [cell for cell in notebook["cells"] if cell["cell_type"] == "code"]


def source(cell: dict[str, Any]) -> str:
    return "".join(cell["source"])


def as_python(text: str) -> str:
    """Return a cell's text with each shell line, also one that is continued, as a call of `shell`."""
    lines, found = iter(text.split("\n")), []
    for line in lines:
        if line.startswith("!"):
            while line.endswith("\\"):
                line += "\n" + next(lines)
            line = f"shell({line[1:]!r})"
        found.append(line)
    return "\n".join(found)


def shell(command: str) -> None:
    """Print what a command prints. Raise CalledProcessError if it fails."""
    done = subprocess.run(command, shell=True, text=True, stdout=subprocess.PIPE, stderr=subprocess.STDOUT)
    print(done.stdout, end="")
    done.check_returncode()


def run(notebook: dict[str, Any]) -> list[str]:
    """Return what each code cell prints, in order. The first error ends it, with what was printed before."""
    names, outputs = {"shell": shell, "__name__": "__main__"}, []
    for cell in code_cells(notebook):
        with contextlib.redirect_stdout(io.StringIO()) as out:
            try:
                exec(compile(ast.parse(as_python(source(cell))), "<cell>", "exec"), names)
            except Exception:
                print(f"in the cell\n{source(cell)}\nafter\n{out.getvalue()}", file=sys.stderr)
                raise
        outputs.append(out.getvalue())
    return outputs


def store(notebook: dict[str, Any], outputs: list[str]) -> None:
    """Put outputs and counts of execution into the cells."""
    for number, (cell, text) in enumerate(zip(code_cells(notebook), outputs, strict=True), 1):
        stream = {"name": "stdout", "output_type": "stream", "text": text.splitlines(keepends=True)}
        cell["outputs"], cell["execution_count"] = [stream] if text else [], number


if __name__ == "__main__":
    place = Path(sys.argv[1]).resolve()
    content = read(place)
    with tempfile.TemporaryDirectory() as folder, contextlib.chdir(folder):
        store(content, run(content))
    place.write_text(json.dumps(content, indent=1, ensure_ascii=False) + "\n", encoding="utf-8")
