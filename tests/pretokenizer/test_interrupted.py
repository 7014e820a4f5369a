"""A run that is killed leaves nothing that opens, and the next one starts anew and says so."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

from tests.pretokenizer.test_pretokenize import place, pretokenize  # noqa: F401 - a fixture

KILLED = """
import os, sys
from megatron_ft.data.shards import ShardWriter
from megatron_ft.config.cli import run_script
from tools.pretokenizer.pretokenize import COMMAND, run

add, left = ShardWriter.add_many, [int(sys.argv.pop(1))]

def add_or_die(self, *samples):
    if not left[0]:
        os._exit(9)
    left[0] -= 1
    add(self, *samples)

ShardWriter.add_many = add_or_die
run_script(COMMAND, run)
"""


@pytest.mark.parametrize("after", [0, 1])
def test_killed_half_way_it_leaves_no_shards_and_starts_again(place, after, capsys):  # noqa: F811
    flags = ("--input", "chats.jsonl", "--tokenizer", "tokenizer.model", "--output_prefix")
    root = Path(__file__).parents[2]
    command = [sys.executable, "-c", KILLED, str(after), *flags, "out/mine"]
    assert subprocess.run(command, env={**os.environ, "PYTHONPATH": str(root)}).returncode == 9
    assert all(path.name.startswith(".") for path in (place / "out").iterdir())
    assert pretokenize(*flags, "out/mine") == 0
    assert "an earlier run was interrupted" in capsys.readouterr().err
    assert pretokenize(*flags, "clean/mine") == 0
    assert {path.name for path in (place / "out").iterdir()} == {path.name for path in (place / "clean").iterdir()}
    for path in (place / "clean").iterdir():
        assert path.read_bytes() == (place / "out" / path.name).read_bytes(), path.name
