"""A second demo replaces the first, and nothing else."""

import pytest

from megatron_ft.demo.folder import SUMMARY, fresh_run_folder
from megatron_ft.errors import ConfigError


def run(folder, text: str) -> None:
    with fresh_run_folder(folder):
        (folder / "result").write_text(text)
        (folder / SUMMARY).write_text("{}")


def test_a_finished_demo_is_replaced(tmp_path):
    folder = tmp_path / "demo"
    run(folder, "first")
    run(folder, "second")
    assert (folder / "result").read_text() == "second"
    assert [path.name for path in tmp_path.iterdir()] == ["demo"]


def test_a_demo_that_was_stopped_leaves_the_finished_one(tmp_path):
    folder = tmp_path / "demo"
    run(folder, "first")
    for _ in range(2):
        with pytest.raises(KeyboardInterrupt), fresh_run_folder(folder):
            raise KeyboardInterrupt
    assert (tmp_path / "demo.previous/result").read_text() == "first"
    run(folder, "second")
    assert [path.name for path in tmp_path.iterdir()] == ["demo"]


def test_someone_s_files_stay(tmp_path):
    (tmp_path / "thesis.txt").write_text("all of it")
    with pytest.raises(ConfigError, match="not a demo's"), fresh_run_folder(tmp_path):
        pass
    assert (tmp_path / "thesis.txt").exists()


def test_a_running_demo_is_left_alone(tmp_path):
    folder = tmp_path / "demo"
    with fresh_run_folder(folder):
        (folder / "result").write_text("half")
        with pytest.raises(ConfigError, match="is running"), fresh_run_folder(folder):
            pass
        assert (folder / "result").exists()
