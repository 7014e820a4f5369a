"""Commands run in processes of their own; what fails says why; nothing stays behind."""

import os
import shlex
import time

import pytest

from megatron_ft.steps.screen import shortened, sparkline, wrapped
from megatron_ft.steps.shell import ON_CPU, CommandFailed, Shell


def test_output_goes_to_the_log_and_back(tmp_path):
    shell = Shell(tmp_path / "log", ON_CPU)
    seen = []
    first = shell.run(["python", "-c", "import time; time.sleep(1); print('one')"], watch=lambda: seen.append(1))
    second = shell.run(["python", "-c", "import os; print('threads', os.environ['OMP_NUM_THREADS'])"])
    assert (first, second) == ("one\n", "threads 1\n") and seen
    assert "$ python -c 'import time" in (tmp_path / "log").read_text().replace('"', "")


def test_a_failure_shows_the_reason_and_not_what_others_said(tmp_path):
    script = "print('noise'); print('megatron-ft x: error: the reason'); print('noise'); raise SystemExit(3)"
    with pytest.raises(CommandFailed, match=r"exit code 3") as caught:
        Shell(tmp_path / "log", ON_CPU).run(["python", "-c", script])
    assert "error: the reason" in str(caught.value) and "| noise" not in str(caught.value)


def test_an_interrupt_stops_the_command(tmp_path):
    child = tmp_path / "pid"

    def interrupt() -> None:
        if child.exists() and child.read_text():
            raise KeyboardInterrupt

    script = f"import os, time; open({str(child)!r}, 'w').write(str(os.getpid())); time.sleep(60)"
    started = time.monotonic()
    with pytest.raises(KeyboardInterrupt):
        Shell(tmp_path / "log", ON_CPU).run(["python", "-c", script], watch=interrupt)
    assert time.monotonic() - started < 30
    with pytest.raises(ProcessLookupError):
        os.kill(int(child.read_text()), 0)


def test_commands_can_be_pasted():
    words = ["megatron-ft", "finetune", "--nproc_per_node", "4", *["--flag_number", "a b"] * 8]
    lines = wrapped(words)
    assert len(lines) > 1 and all(line.endswith(" \\") for line in lines[:-1]) and max(map(len, lines)) < 92
    assert shlex.split("\n".join(lines).removeprefix("$ ").replace("\\\n", " ")) == words


def test_small_print():
    assert sparkline([8, 1, 1, 0]) == "█▂▂▁" and sparkline([]) == ""
    assert shortened("a\nb\x1b[31m " + "c" * 50, 10) == "a b [31..."
