"""What a command will write is tried before it starts, in every command."""

import pytest

from megatron_ft.commands.table import ENTRIES, load
from megatron_ft.config.cli import run_script
from megatron_ft.config.fields import options_of

NOT_WRITTEN = {
    "pretokenize",
    "finetune",
    "preflight",
    "resume-check",
    "doctor",
    "measure",
    "evaluate retrieval",
    "score",
}
"""Commands that look themselves, because they write only in some cases; their own tests show it."""


def places():
    for name in ENTRIES:
        for option in options_of(load(name)[0].sections).values():
            if option.writes:
                yield name, option.name


def filled(name, but):
    command, _ = load(name)
    words = []
    for option in options_of(command.sections).values():
        if option.required and option.name != but:
            words += [f"--{option.name}", "1"]
    return command, words


@pytest.mark.parametrize(("name", "flag"), list(places()))
def test_a_place_that_cannot_be_written_is_refused_at_once(name, flag, capsys):
    command, words = filled(name, flag)
    code = run_script(command, lambda *_: pytest.fail("it started"), [*words, f"--{flag}", "/proc/foo/bar"])
    said = capsys.readouterr().err
    assert code == 2 and f"--{flag} /proc/foo" in said and "/proc cannot be written to (a folder of the system)" in said


def test_no_output_is_forgotten():
    """Settings that are named as results are."""
    for name in set(ENTRIES) - NOT_WRITTEN:
        for option in options_of(load(name)[0].sections).values():
            if (
                option.name in ("output", "output_dir", "output_prefix", "html", "report", "work_dir")
                and not option.is_switch
            ):
                assert option.writes, f"{name} --{option.name}"
