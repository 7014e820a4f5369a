"""The notebook runs from its first cell to the last, and the answers that are stored in it are those of a run."""

import json
import os
import re
import subprocess
import sys

import pytest

from tests.docs.notebook import as_python, code_cells, read, source
from tests.errors.conftest import interpreter_of_the_desk
from tests.test_layers import ROOT, tracked

NOTEBOOK = ROOT / "examples" / "my_chats" / "first_finetune.ipynb"
IN_THE_FOLDER = """import os, sys
os.chdir(sys.argv.pop(1))
from megatron_ft.__main__ import main
sys.exit(main(sys.argv[1:]))
"""
RUN = """import json, sys
from pathlib import Path
from tests.docs import notebook
print(json.dumps(notebook.run(notebook.read(Path(sys.argv[1])))))
"""


@pytest.fixture(scope="module")
def outputs(tmp_path_factory) -> list[str]:
    """What the cells print, in an empty folder. Commands are forked from the desk of the engine."""
    folder = tmp_path_factory.mktemp("notebook")
    (folder / "enter.py").write_text(IN_THE_FOLDER)
    with interpreter_of_the_desk() as python:
        program = folder / "bin" / "megatron-ft"
        program.parent.mkdir()
        program.write_text(f'#!/bin/sh\nexec {python} {folder}/enter.py "$PWD" "$@"\n')
        program.chmod(0o755)
        environment = os.environ | {"PATH": f"{program.parent}:{os.environ['PATH']}", "PYTHONPATH": str(ROOT)}
        done = subprocess.run(
            [sys.executable, "-c", RUN, str(NOTEBOOK)], cwd=folder, env=environment, capture_output=True, text=True, timeout=300
        )  # fmt: skip
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout)


def stored() -> list[str]:
    return ["".join("".join(one["text"]) for one in cell["outputs"]) for cell in code_cells(read(NOTEBOOK))]


def answers(text: str) -> list[str]:
    return re.findall(r"^  -> (.*)$", text, re.MULTILINE)


@pytest.mark.slow
def test_it_learns(outputs):
    asked = [text for text in outputs if answers(text)]
    assert len(asked) == 2
    before, after = map(answers, asked)
    assert after == [
        "Yes, if it does not bark at the fish.",
        "Two goldfish, Comma and Full Stop.",
        "Twelve, for four weeks.",
    ]
    assert before[0] != after[0]
    assert "chat_template.jinja" in outputs[-1] and "README.md" in outputs[-1]


@pytest.mark.slow
def test_the_stored_outputs_are_those_of_a_run(outputs):
    """The same cells print, and the trained model answers what is stored."""
    assert [bool(text) for text in outputs] == [bool(text) for text in stored()]
    assert answers(outputs[-2]) == answers(stored()[-2]), "python -m tests.docs.notebook " + NOTEBOOK.name


def test_links_and_names():
    """Links lead somewhere, no folder of a machine is in the outputs, every cell was run in order."""
    text = NOTEBOOK.read_text(encoding="utf-8")
    for target in re.findall(r"\]\(([^)#\s]+)", "".join(map(source, read(NOTEBOOK)["cells"]))):
        assert (NOTEBOOK.parent / target).exists(), target
    assert "/tmp" not in text and [cell["execution_count"] for cell in code_cells(read(NOTEBOOK))] == list(
        range(1, len(stored()) + 1)
    )
    assert tracked("*.ipynb") == [NOTEBOOK]


def test_shell_lines():
    assert as_python("x = 1\n!echo a \\\n  b\ny") == "x = 1\nshell('echo a \\\\\\n  b')\ny"
