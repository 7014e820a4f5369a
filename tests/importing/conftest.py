"""Imports of small files, written here with the real names of the tools."""

import json
import shlex

import pytest

from megatron_ft.commands.finetune import COMMAND
from megatron_ft.commands.import_command import COMMAND as IMPORT
from megatron_ft.commands.import_command import run
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
        line = next(one for one in found["commands"] if one.startswith("megatron-ft finetune "))
        found["settings"] = settings_of(line)
        found["here"] = {row["there"]: row["here"] for row in found["taken"]}
        found["why"] = {row["there"]: row["why"] for row in [*found["ignored"], *found["impossible"]]}
        return found

    return imported


def settings_of(line):
    """Return the settings of a printed command; each of our other commands in it is parsed too."""
    (settings,) = parse(COMMAND, shlex.split(line)[2:])
    launching = settings.launching
    check_settings(settings, (launching.nproc_per_node or 1) * (launching.nnodes or 1))
    return settings
