"""One range of megatron-core's versions, wherever it is written."""

import re
from pathlib import Path

import pytest
from packaging.specifiers import SpecifierSet

from megatron_ft.commands import doctor
from megatron_ft.engine.versions import TRIED, check_version, release
from megatron_ft.errors import EngineError

ROOT = Path(__file__).resolve().parents[2]
REFUSED = ("0.15.3", "0.17.0", "0.18.0", "0.20.0", "1.0.0")


def read(name: str) -> str:
    return (ROOT / name).read_text(encoding="utf-8")


@pytest.mark.parametrize("version", [*TRIED, "0.16.0", "0.19.0", "0.19.3rc1"])
def test_releases_that_were_tried(version):
    check_version(version)


@pytest.mark.parametrize("version", REFUSED)
def test_other_releases_are_refused_with_what_to_install(version):
    with pytest.raises(EngineError) as error:
        check_version(version)
    assert str(error.value) == (
        f"megatron-core {version} is installed, but megatron_ft was tried with 0.16.1 and 0.19.2: "
        "pip install megatron-core==0.19.2 (Python 3.12) or 0.16.1"
    )


def test_what_is_installed_is_what_is_supported():
    (allowed,) = re.findall(r'"megatron-core([^"]+)"', read("setup.py"))
    allowed = SpecifierSet(allowed)
    assert all(version in allowed for version in TRIED)
    assert not any(version in allowed for version in REFUSED)


def test_both_ends_are_tested():
    assert f"\nmegatron-core=={TRIED[0]}\n" in read("constraints.txt")
    assert f"\nENGINE := {TRIED[-1]}\n" in read("Makefile")


@pytest.mark.parametrize("name", ["README.md", "docs/architecture.md", "CHANGELOG.md", "CONTRIBUTING.md"])
def test_the_pages_say_the_same(name):
    said = {release(version) for version in re.findall(r"megatron-core (\d+\.\d+\S*) (?:or|and) \d", read(name))}
    said |= {release(version) for version in re.findall(r"megatron-core \S+ (?:or|and) (\d+\.\d+\S*)", read(name))}
    assert said == {release(version) for version in TRIED}


def test_the_doctor_says_the_same():
    assert all(version in doctor.TRIED["megatron-core"] for version in TRIED)
