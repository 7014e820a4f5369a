"""The command line, and what a user sees at the end: exit codes, one line, no traceback."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
SCRIPT = Path(__file__).parent / "sections_for_tests.py"
HEAVY = ("torch", "megatron", "transformers", "numpy", "pydantic", "yaml")


def start(*argv: str, **environment: str) -> subprocess.CompletedProcess:
    return subprocess.run(
        [sys.executable, *argv], capture_output=True, text=True, timeout=60, env={**os.environ, **environment}
    )


def desk(*argv: str) -> subprocess.CompletedProcess:
    return start("-m", "megatron_ft", *argv)


def script(*argv: str, **environment: str) -> subprocess.CompletedProcess:
    return start(str(SCRIPT), "--load", "x", *argv, **environment)


@pytest.mark.parametrize("argv", [[], ["--help"], ["-h"], ["help"]])
def test_overview_names_every_command(argv):
    from megatron_ft.commands.table import COMMANDS

    done = desk(*argv)
    assert done.returncode == 0 and not done.stderr
    for group, entries in COMMANDS.items():
        assert f"\n{group}\n" in done.stdout
        for name, entry in entries.items():
            assert any(line.split() == [*name.split(), *entry.summary.split()] for line in done.stdout.splitlines())
    assert max(map(len, done.stdout.splitlines())) <= 80


def test_overview_imports_nothing_heavy():
    # Modules, not seconds: seconds depend on the machine.
    code = f"import sys, megatron_ft.__main__ as m; m.main(['--help']); print([n for n in {HEAVY} if n in sys.modules])"
    assert start("-c", code).stdout.splitlines()[-1] == "[]"


def test_help_of_each_command_is_there_and_does_not_import_torch():
    from megatron_ft.commands.table import ENTRIES

    code = "import sys, megatron_ft.__main__ as m; rc = m.main([*sys.argv[1].split(), '--help']); print(rc, 'torch' in sys.modules)"
    for name, entry in ENTRIES.items():
        if not (ROOT / entry.module.replace(".", "/")).with_suffix(".py").exists():
            continue  # named, not written yet
        done = start("-c", code, name)
        assert done.stdout.startswith(f"usage: megatron-ft {name} "), done.stderr
        assert done.stdout.splitlines()[-1] == "0 False", name


def test_version():
    from megatron_ft import __version__

    assert desk("--version").stdout == f"megatron_ft {__version__}\n"


@pytest.mark.parametrize(
    "name, hint",
    [
        ("finetun", "; did you mean finetune?"),
        ("hf_to_megatro", "; did you mean hf-to-megatron?"),
        ("xyz", "; megatron-ft --help lists them"),
    ],
)
def test_unknown_command(name, hint):
    done = desk(name)
    assert (done.returncode, done.stdout) == (2, "")
    assert done.stderr == f"megatron-ft: error: unknown command {name}{hint}\n"


@pytest.fixture
def two_words(monkeypatch):
    """Two commands of two words, over the modules of others."""
    from megatron_ft.commands.table import ENTRIES

    monkeypatch.setitem(ENTRIES, "count letters", ENTRIES["report"])
    monkeypatch.setitem(ENTRIES, "count words", ENTRIES["demo"])


def test_a_name_of_two_words_is_found_and_takes_flags(two_words):
    from megatron_ft.commands.table import ENTRIES, find

    assert find(["count", "letters", "--x", "1"]) == ("count letters", ["--x", "1"])
    assert find(["count", "--x"]) == (None, ["count", "--x"])
    assert find(["train", "--load", "x"], ENTRIES) == ("finetune", ["--load", "x"])


def test_the_first_of_two_words_lists_the_commands_that_begin_so(two_words, capsys):
    from megatron_ft.__main__ import main

    for argv in (["count"], ["count", "--help"], ["count", "help"]):
        assert main(argv) == 0
        lines = capsys.readouterr().out.splitlines()
        assert [line.split()[:2] for line in lines if line.startswith("  ")] == [
            ["count", "letters"],
            ["count", "words"],
        ]


@pytest.mark.parametrize(
    "argv, message",
    [
        (["count", "leters"], "unknown command count leters; did you mean count letters?"),
        (["count", "qqqqqqqqqq", "--x"], "unknown command count qqqqqqqqqq; megatron-ft count --help lists them"),
        (["count", "--x"], "count needs a second word before its flags, one of: letters, words"),
        (["cuont", "letters"], "unknown command cuont; did you mean count?"),
    ],
)
def test_unknown_second_word(two_words, argv, message, capsys):
    from megatron_ft.__main__ import main

    assert main(argv) == 2
    said = capsys.readouterr()
    assert (said.out, said.err) == ("", f"megatron-ft: error: {message}\n")


def test_a_mistake_in_flags_is_one_line_and_exit_code_2():
    done = script("--learning_rate", "3")
    assert (done.returncode, done.stdout) == (2, "")
    assert done.stderr == "megatron-ft try: error: unknown flag --learning_rate; here it is --lr\n"


def test_a_mistake_found_later_is_one_line_and_exit_code_2():
    done = script("--name", "user")
    assert (done.returncode, done.stdout) == (2, "")
    assert done.stderr == "megatron-ft try: error: shards end early run pretokenize again\n"


def test_of_several_processes_one_reports_the_flags_and_each_what_it_met():
    assert script("--learning_rate", "3", RANK="5", LOCAL_RANK="1").stderr == ""
    assert "here it is --lr" in script("--learning_rate", "3", RANK="8", LOCAL_RANK="0").stderr
    assert script("--name", "user", RANK="5", LOCAL_RANK="1").stderr.endswith("pretokenize again (rank 5)\n")


def test_what_the_system_refuses_is_one_line_and_exit_code_2():
    done = script("--name", "disk")
    line = "megatron-ft try: error: runs/tuned: No space left on device; check the path, its rights and the disk\n"
    assert (done.returncode, done.stderr) == (2, line)


def test_our_bug_is_a_traceback_and_exit_code_1():
    done = script("--name", "bug")
    assert done.returncode == 1 and "Traceback" in done.stderr and "RuntimeError: a bug" in done.stderr


def test_stopped_by_the_user_is_130():
    done = script("--name", "stop")
    assert (done.returncode, done.stderr) == (130, "megatron-ft try: stopped by Ctrl-C\n")


def test_a_command_s_own_exit_code():
    assert script().returncode == 0
    assert script("--name", "three").returncode == 3
    assert script("--help").returncode == 0
