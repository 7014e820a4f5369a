"""The report names what is there, and what is missing for what."""

from megatron_ft.commands import doctor


def test_the_report(capsys, monkeypatch):
    real = doctor._version
    monkeypatch.setattr(doctor, "_version", lambda name: None if name == "wandb" else real(name))
    assert doctor.run(doctor.Doctor()) == 0
    said = capsys.readouterr().out
    engine = (
        f"megatron-core        {real('megatron-core')}  (tested with 0.16.1 and 0.19.2; other releases are refused)"
    )
    assert engine in said and "not installed  (for --wandb_logger)" in said
    assert "device" in said and "optimizer" in said
    assert said.endswith("to test this machine: megatron-ft doctor --check\n")


def test_something_needed_is_missing(capsys, monkeypatch):
    real = doctor._version
    monkeypatch.setattr(doctor, "_version", lambda name: None if name == "sentencepiece" else real(name))
    assert doctor.run(doctor.Doctor()) == 2
    assert "sentencepiece        MISSING" in capsys.readouterr().out
