"""Plans of epochs in files: the same rows as without, mapped, made anew where they are damaged, and never in the way."""

import multiprocessing
import os
from pathlib import Path

import numpy as np
import pytest

from megatron_ft.data import loader, plan_cache
from megatron_ft.data.loader import ChatDataset, Choices
from tests.training.test_packing import Memory


@pytest.fixture(autouse=True)
def small_sets_too(monkeypatch):
    monkeypatch.setattr(loader, "WORTH_KEEPING", 1)


LENGTHS = np.random.default_rng(0).integers(2, 40, 400).tolist()


def rows_of(cache, epochs=3, **choices):
    dataset = ChatDataset([Memory(LENGTHS)], np.array([0, 0, 1, 0], np.float32), Choices(32, cache=cache, **choices))
    return [
        [dataset.epoch_rows(e).samples(i).tolist() for i in range(len(dataset.epoch_rows(e)))] for e in range(epochs)
    ]


@pytest.mark.parametrize("choices", [{}, {"packed": False}, {"shuffle": False}, {"over_long": "split"}, {"seed": 9}])
def test_the_same_rows_kept_or_not(tmp_path, choices):
    plain = rows_of(None, **choices)
    assert rows_of(str(tmp_path / "plans"), **choices) == plain
    assert len(list((tmp_path / "plans").glob("*.npy"))) == 3
    assert rows_of(str(tmp_path / "plans"), **choices) == plain


def test_they_are_mapped_and_found_by_all_that_they_depend_on(tmp_path):
    cache = str(tmp_path)
    rows_of(cache, 1)
    dataset = ChatDataset([Memory(LENGTHS)], np.array([0, 0, 1, 0], np.float32), Choices(32, cache=cache))
    assert isinstance(dataset.epoch_rows(0).order, np.memmap)
    assert not dataset.epoch_rows(0).order.flags.writeable
    for other in ({"seed": 5}, {"over_long": "drop"}, {"packed": False}):
        assert rows_of(cache, 1, **other) == rows_of(None, 1, **other)
    assert len(list(tmp_path.glob("*.npy"))) == 4


def test_a_damaged_plan_is_made_anew(tmp_path, caplog):
    plain = rows_of(str(tmp_path), 1)
    (path,) = tmp_path.glob("*.npy")
    whole = path.read_bytes()
    for place in range(0, len(whole), 97):
        damaged = bytearray(whole)
        damaged[place] ^= 16
        path.write_bytes(damaged)
        assert rows_of(str(tmp_path), 1) == plain
        assert path.read_bytes() == whole
    for content in (b"", whole[:200], b"no numbers"):
        path.write_bytes(content)
        assert rows_of(str(tmp_path), 1) == plain


def test_where_nothing_can_be_written_they_stay_in_memory(tmp_path):
    (tmp_path / "file").write_text("")
    assert rows_of(str(tmp_path / "file" / "plans")) == rows_of(None)


def test_one_process_builds_and_the_others_wait(tmp_path):
    with multiprocessing.get_context("fork").Pool(4) as pool:
        pool.starmap(_build, [(tmp_path, i) for i in range(4)], chunksize=1)
    assert len(list(tmp_path.glob("built-*"))) == 1
    assert [path.name for path in tmp_path.glob("plans/.*.tmp*")] == []


def _build(folder: Path, number: int) -> None:
    def build():
        (folder / f"built-{number}-{os.getpid()}").touch()
        return [np.arange(1000), np.arange(3)]

    first, second = plan_cache.cached(folder / "plans", ["key"], build)
    assert (len(first), second.tolist()) == (1000, [0, 1, 2])


def test_old_plans_go(tmp_path):
    for number in range(plan_cache.KEPT + 5):
        plan_cache.cached(tmp_path, number, lambda number=number: [np.array([number])])
    assert len(list(tmp_path.glob("*.npy"))) == plan_cache.KEPT
