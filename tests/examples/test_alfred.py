"""examples/alfred_40b/small.sh: methods trained, measured and compared, with one step each."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
EXAMPLE = ROOT / "examples" / "alfred_40b"


@pytest.mark.slow
@pytest.mark.thorough
def test_methods_are_compared(tmp_path):
    every = (EXAMPLE / "methods.txt").read_text().splitlines()
    assert [line.split()[0] for line in every] == ["PI", "NTK", "NTK-by-parts", "YaRN", "NTK-Margin", "NTK-YaRN"]
    (tmp_path / "methods.txt").write_text("\n".join([every[0], every[-1]]) + "\n")
    environment = {**os.environ, "STEPS": "1", "SAMPLES": "1", "METHODS": str(tmp_path / "methods.txt")}
    environment |= {"PYTHON": sys.executable, "PYTHONPATH": str(ROOT)}
    words = [str(EXAMPLE / "small.sh"), str(tmp_path)]
    done = subprocess.run(words, env=environment, capture_output=True, text=True, timeout=600)
    assert done.returncode == 0, done.stdout + done.stderr
    result = json.loads((tmp_path / "results" / "methods" / "retrieval.json").read_text())
    assert [model["name"] for model in result["models"]] == ["PI", "NTK-YaRN"]
    assert all(set(model["tasks"]["lines"]) == {"512", "1024"} for model in result["models"])
    assert "Knowledge cutoff: November 2022" in result["system"]
    for name, method in (("PI", "linear"), ("NTK-YaRN", "ntk-yarn")):
        assert f'"rope_type": "{method}"' in (tmp_path / "start" / name / "release" / "config.json").read_text()
