"""The reference of flags and the shell completion know what the commands know."""

import shlex
import subprocess

import pytest

from megatron_ft.commands.completion import COMMAND as COMPLETION
from megatron_ft.commands.completion import run as complete
from megatron_ft.commands.flags import Flags, named, reference, run
from megatron_ft.commands.table import ENTRIES, load
from megatron_ft.config.fields import options_of
from megatron_ft.errors import ConfigError


def test_every_flag_of_every_command_is_in_the_reference():
    chapters = dict(part.split("\n", 1) for part in reference([]).split("### megatron-ft ")[1:])
    assert set(chapters) == set(ENTRIES)
    for name, text in chapters.items():
        for option in options_of(load(name)[0].sections).values():
            assert text.count(f"| `--{option.name}`") == 1, (name, option.name)


def test_one_command_and_an_unknown_one():
    text = reference(["report"])
    assert text.startswith("### megatron-ft report") and text.count("###") == 1 and "**needed**" in text
    with pytest.raises(ConfigError, match="no command reprot"):
        run(Flags(["reprot"]))


@pytest.fixture
def two_words(monkeypatch):
    """A command of two words, over the module of another."""
    monkeypatch.setitem(ENTRIES, "count letters", ENTRIES["report"])


def test_words_name_commands(two_words):
    assert named(["count", "letters", "report"]) == ["count letters", "report"]
    assert named(["count"]) == ["count letters"]


@pytest.mark.parametrize(
    "typed, expected",
    [
        ("meg", None),
        ("megatron-ft fine", ["finetune"]),
        ("megatron-ft finetune --micro", ["--micro_batch_size"]),
        ("megatron-ft train --no_pack", ["--no_packing"]),
        ("megatron-ft megatron-to-hf --out", ["--output_dir"]),
        ("megatron-ft count le", ["letters"]),
        ("megatron-ft count letters --out", ["--output"]),
        ("megatron-ft nonsense --x", []),
    ],
)
def test_bash_completes(typed, expected, two_words, capsys):
    complete(COMPLETION.sections[0]("bash"))
    script = capsys.readouterr().out
    words = typed.split()
    ask = f'{script}\nCOMP_WORDS=({shlex.join(words)}); COMP_CWORD={len(words) - 1}; _megatron_ft; echo "${{COMPREPLY[@]}}"'
    if expected is None:
        ask = f"{script}\ncomplete -p megatron-ft"
        expected = ["complete", "-o", "filenames", "-F", "_megatron_ft", "megatron-ft"]
    done = subprocess.run(["bash", "-c", ask], capture_output=True, text=True, timeout=30, check=True)
    assert done.stdout.split() == expected
