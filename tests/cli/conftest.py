"""The two ways of asking: parsed settings, or the message of a refusal."""

from types import SimpleNamespace

import pytest

from megatron_ft.config.cli import parse
from megatron_ft.errors import UserError
from tests.cli.sections_for_tests import COMMAND


@pytest.fixture
def read():
    """read("--lr", "1") -> every setting by name; --load is given."""

    def read(*argv: str, command=COMMAND) -> SimpleNamespace:
        sections = parse(command, ["--load", "checkpoint", *argv] if command is COMMAND else argv)
        return SimpleNamespace(**{key: value for section in sections for key, value in vars(section).items()})

    return read


@pytest.fixture
def refusal(read):
    """refusal("--lr", "x") -> the message, which is one line."""

    def refusal(*argv: str) -> str:
        with pytest.raises(UserError) as caught:
            read(*argv)
        assert "\n" not in str(caught.value)
        return str(caught.value)

    return refusal


@pytest.fixture
def file(tmp_path):
    """file("lr: 1") -> path of a YAML file with this text."""

    def file(text: str) -> str:
        path = tmp_path / "run.yaml"
        path.write_text(text)
        return str(path)

    return file
