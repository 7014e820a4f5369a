"""Imports of small files, written here with the real names of the tools."""

import json
import shlex

import pytest

from megatron_ft.commands.finetune import COMMAND
from megatron_ft.commands.import_command import COMMAND as IMPORT
from megatron_ft.commands.import_command import run
from megatron_ft.commands.table import load
from megatron_ft.config.checks import check_settings
from megatron_ft.config.cli import parse


@pytest.fixture
def imported(tmp_path, monkeypatch, capsys):
    """imported(text, "--gpus", 8, name="run.yml") -> what --json prints, with `settings`: the finetune command as our parser reads it."""
    monkeypatch.chdir(tmp_path)

    def imported(text, *words, name="run.yml"):
        (tmp_path / name).write_text(text)
        run(*parse(IMPORT, [name, "--json", *map(str, words)]))
        found = json.loads(capsys.readouterr().out)
        for one in found["commands"]:
            parsed(one)
        line = next(one for one in found["commands"] if one.startswith("megatron-ft finetune "))
        found["settings"] = settings_of(line)
        found["here"] = {row["there"]: row["here"] for row in found["taken"]}
        found["why"] = {row["there"]: row["why"] for row in [*found["ignored"], *found["impossible"]]}
        return found

    return imported


def parsed(line):
    """Parse a printed command of ours with its own parser."""
    words = shlex.split(line)
    if words[0] == "megatron-ft":
        return parse(load(words[1])[0], words[2:])
    assert words[:2] == ["hf", "download"]
    return None


def settings_of(line):
    """Return the settings of a printed finetune command, which must pass the checks that need no model."""
    (settings,) = parse(COMMAND, shlex.split(line)[2:])
    launching = settings.launching
    check_settings(settings, (launching.nproc_per_node or 1) * (launching.nnodes or 1))
    return settings
