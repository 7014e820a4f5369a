"""The lock of the folder that demo and tune write to."""

import pytest

from megatron_ft.demo.folder import MARKER, fresh_run_folder
from megatron_ft.errors import ConfigError
from megatron_ft.steps.lock import held
from megatron_ft.tune.folder import locked


def test_a_folder_has_one_run_at_a_time(tmp_path):
    with locked(tmp_path), pytest.raises(ConfigError, match=r"-o .*another tune is running in it"), locked(tmp_path):
        pass
    with locked(tmp_path):
        pass  # the first has let it go


def test_a_demo_refuses_the_folder_of_one_that_runs(tmp_path):
    with (
        held(tmp_path / MARKER, "taken"),
        pytest.raises(ConfigError, match="another demo is running"),
        fresh_run_folder(tmp_path),
    ):
        pass
    assert (tmp_path / MARKER).exists()
