"""The help of one screen: its size, what it leaves out, and what it may not leave out."""

from dataclasses import dataclass
from typing import Literal

import pytest

from megatron_ft.commands.table import ENTRIES, load
from megatron_ft.config.cli import Command, parse
from megatron_ft.config.fields import options_of
from megatron_ft.config.help import SCREEN, WIDTH, brief


def shown(command, capsys, *argv):
    with pytest.raises(SystemExit) as stop:
        parse(command, list(argv))
    assert stop.value.code == 0
    return capsys.readouterr().out


@pytest.mark.parametrize("name", ENTRIES)
def test_the_help_of_every_command_is_one_screen(name, capsys, monkeypatch):
    monkeypatch.setenv("COLUMNS", str(WIDTH))
    command = load(name)[0]
    options = options_of(command.sections)
    first, whole = shown(command, capsys, "--help"), shown(command, capsys, "--help", "all")
    assert len(first.splitlines()) <= SCREEN
    assert all(f"--{option.name}" in whole and option.help.split()[0] in whole for option in options.values())
    if first == whole:
        return
    assert max(map(len, first.splitlines())) <= WIDTH
    assert f"megatron-ft {name} --help all" in first.splitlines()[-1]
    listed = [one.partition(":")[0] for one in command.common]
    assert set(listed) <= set(options), "a name in `common` is no flag"
    for option in options.values():
        is_there = f"--{option.name}" in first.split() or f"--[no_]{option.name}" in first.split()
        assert is_there == (not listed or option.name in listed)
        assert is_there or not option.required


def test_other_spellings_of_help(capsys):
    command = load("finetune")[0]
    first = shown(command, capsys, "-h")
    assert first == shown(command, capsys, "--lr", "3", "--help") == shown(command, capsys, "--help=lr")
    assert shown(command, capsys, "-h", "all") == shown(command, capsys, "--help=all") != first


@dataclass
class Few:
    """Settings; all of them"""

    size: int = 3
    """a number"""
    kind: Literal["one", "two"] = "two"
    """which"""
    fast: bool = True
    """do it at once"""
    names: tuple[str, ...] = ()
    """words, each a name; default: none at all"""


def test_a_screen_has_types_defaults_and_an_example(capsys, monkeypatch):
    monkeypatch.setattr("megatron_ft.config.flags.SCREEN", 0)
    example = f'megatron-ft few --names "a b" {"x" * 50} --size 4'
    command = Command("few", "takes a few", (Few,), (example,), common=("size: how many", "kind", "fast", "names"))
    lines = shown(command, capsys, "--help").splitlines()
    assert [" ".join(line.split()) for line in lines] == [
        "usage: megatron-ft few [--flag value ...]", "takes a few", "",
        "Settings", "--size N how many [3]", "--kind {one,two} which [two]", "--[no_]fast do it at once",
        "--names TEXT ... words, each a name; default: none at all",
        "Settings", "--config FILE.yaml read settings from a file; flags win", "--print_config print all settings as YAML and stop", "",
        "example:", 'megatron-ft few --names "a b" \\', "x" * 50 + " --size 4", "more about them: megatron-ft few --help all",
    ]  # fmt: skip


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("a short text", "a short text"),
        ("a text; default: 3", "a text"),
        ("the first sentence. The second", "the first sentence"),
        ("a folder that is long enough (with a remark that is much too long to fit)", "a folder that is long enough"),
        ("a list of many things: one, two, three, four, five, six, seven", "a list of many things: one, two"),
        ("with --x: " + "y" * 12 + " z" * 30, "with --x: yyyyyyyyyyyy z z ..."),
    ],
)  # fmt: skip
def test_a_long_text_ends_at_a_joint(text, expected):
    assert " ".join(brief(text, 20)) == expected
