"""The Dockerfiles name what is there: files, extras, a torch that setup.py takes; their commands are shell."""

import re
import subprocess
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
FILES = sorted((ROOT / "docker").glob("*.Dockerfile"))
SETUP = (ROOT / "setup.py").read_text()


def instructions(path: Path) -> list[tuple[str, str]]:
    """Each instruction with its argument, continued lines joined, comments left out."""
    lines = [line for line in path.read_text().splitlines() if not line.startswith("#")]
    joined = "\n".join(lines).replace("\\\n", " ")
    return [tuple(line.split(maxsplit=1)) for line in joined.splitlines() if line.strip()]


@pytest.mark.parametrize("path", FILES, ids=lambda path: path.name)
def test_what_a_dockerfile_names_is_there(path):
    found = instructions(path)
    assert {"FROM", "RUN", "COPY", "WORKDIR", "CMD"} <= {name for name, _ in found}
    for name, argument in found:
        if name == "RUN":
            assert subprocess.run(["bash", "-n", "-c", argument], capture_output=True).returncode == 0, argument
            for extras in re.findall(r"\.\[([\w,]+)\]", argument):
                assert all(re.search(rf'"{extra}": ', SETUP) for extra in extras.split(",")), argument
        if name == "COPY":
            assert all((ROOT / source).exists() for source in argument.split()[:-1]), argument


def test_the_images_have_a_python_and_a_torch_that_are_supported():
    cpu, gpu = (ROOT / f"docker/{kind}.Dockerfile" for kind in ("cpu", "gpu"))
    assert dict(instructions(cpu))["FROM"].startswith("python:3.11")
    image = re.search(r"pytorch/pytorch:(\d+)\.(\d+)", gpu.read_text())
    least = re.search(r'"torch>=(\d+)\.(\d+)"', SETUP)
    assert tuple(map(int, image.groups())) >= tuple(map(int, least.groups()))


def test_nothing_that_is_large_or_private_goes_into_an_image():
    ignored = (ROOT / ".dockerignore").read_text().split()
    assert {".git", ".venv*", "runs", "wandb"} <= set(ignored)
