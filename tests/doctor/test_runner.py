"""Whatever becomes of a check's process, its line says so and the next check runs; nothing is left behind."""

import os
import tempfile
from pathlib import Path

import pytest

from megatron_ft.commands import doctor
from megatron_ft.doctor.checks import CHECKS, Check
from megatron_ft.doctor.result import Result
from megatron_ft.doctor.runner import check_runner
from megatron_ft.doctor.verdict import verdict, write_report
from megatron_ft.errors import ConfigError, UserError


def trouble(name: str, seconds: float = 60) -> Check:
    return Check(name, f"tests.doctor.broken_machine:{name}", seconds)


def test_every_end_of_a_process_is_a_line():
    checks = [
        trouble("segfault"),
        trouble("sound"),
        trouble("hang", 8),
        trouble("bug"),
        trouble("mistake"),
        trouble("leave"),
    ]
    with check_runner() as runner:
        results = list(runner.results([*checks, Check("again", "tests.doctor.broken_machine:sound", 60)]))
        folder, worker = runner.folder, runner.worker.pid
    assert [result.outcome for result in results] == ["fail", "pass", "fail", "fail", "fail", "fail", "pass"]
    said = [result.detail for result in results]
    assert said[0] == "the process was ended by SIGSEGV" and "last words" in results[0].log
    assert "it hangs: no result within 8 s" in said[2]
    assert said[3] == "ValueError: the cat sat on it" and "Traceback" in results[3].log
    assert said[4] == "the disk is full: make room" and said[5] == "the process ended with exit code 1"
    assert not folder.exists() and not Path(f"/proc/{worker}").exists()


def test_all_functions_of_the_list_are_there():
    """By their names in the source: importing them would import the engine."""
    import megatron_ft.doctor

    for check in CHECKS:
        module, function = check.function.split(":")
        source = (Path(megatron_ft.doctor.__file__).parent / f"{module}.py").read_text()
        assert f"def {function}(folder: Path) -> Found:" in source, check
    assert len({check.name for check in CHECKS}) == len({check.function for check in CHECKS}) == len(CHECKS)


GOOD, BAD = Result("one", "pass", "it works", 1.0), Result("two", "fail", "it does not: mend it", 2.0, "Traceback ...")


def test_verdict_and_report(tmp_path):
    assert verdict([GOOD], 61) == "1 passed, 0 skipped, 0 failed in 1:01. All checks passed on this machine."
    assert "not tested" in verdict([GOOD, Result("three", "skipped", "no GPU", 0.0)], 5)
    said = verdict([GOOD, BAD], 5)
    assert "1 failed" in said and "FAILED: two." in said
    write_report(tmp_path / "report.txt", ["torch 2"], [GOOD, BAD], said)
    text = (tmp_path / "report.txt").read_text()
    assert all(part in text for part in ("torch 2", "it works", "it does not: mend it", said, "Traceback ..."))


@pytest.mark.parametrize("results, code", [([GOOD], 0), ([GOOD, BAD], 1)])
def test_the_command(results, code, tmp_path, monkeypatch, capsys):
    import megatron_ft.doctor.runner

    monkeypatch.setattr(megatron_ft.doctor.runner.CheckRunner, "results", lambda self: iter(results))
    report = tmp_path / "mine.txt"
    assert doctor.run(doctor.Doctor(check=True, check_report=str(report))) == code
    out = capsys.readouterr().out
    assert "  pass     one" in out and str(report) in out and "megatron-core" in report.read_text()


def test_mistakes(tmp_path):
    with pytest.raises(ConfigError, match="--check_report has an effect only with --check"):
        doctor.run(doctor.Doctor(check_report="mine.txt"))
    (tmp_path / "file").touch()
    with pytest.raises(UserError, match="is not a folder"):
        doctor.run(doctor.Doctor(check=True, check_report=str(tmp_path / "file" / "mine.txt")))


@pytest.mark.thorough
def test_all_checks_on_this_cpu(tmp_path, monkeypatch, capsys):
    monkeypatch.setenv("MEGATRON_FT_DEVICE", "cpu")
    before = set(os.listdir(tempfile.gettempdir()))
    code = doctor.run(doctor.Doctor(check=True, check_report=str(tmp_path / "report.txt")))
    out = capsys.readouterr().out
    assert code == 0 and out.count("  pass     ") == 13 and out.count("  skipped  ") == 8, out
    assert not [name for name in set(os.listdir(tempfile.gettempdir())) - before if "doctor" in name]
