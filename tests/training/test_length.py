"""--epochs becomes a number of steps: every sample comes so often, a resumed run has the same number, and it is given once."""

from pathlib import Path

import numpy as np
import pytest

from megatron_ft.commands import finetune
from megatron_ft.config.cli import parse
from megatron_ft.config.schedule import warmup_given_once
from megatron_ft.config.sections import Batch, Data, Optimizer
from megatron_ft.config.settings import TrainingSettings
from megatron_ft.data.loader import ChatDataset
from megatron_ft.errors import ConfigError
from megatron_ft.training import length
from megatron_ft.training.datasets import make_datasets
from tests.training.test_datasets import CHECKPOINT, write

LENGTHS = [9, 5, 17, 3, 12, 30, 8, 21, 4, 6, 11, 25, 14]


def dataset(folder: Path, lengths: list[int] = LENGTHS, **data) -> ChatDataset:
    prefix = write(folder / "x-train", lengths)
    return make_datasets(Data([prefix], seq_length=32, data_cache_path="none", **data), CHECKPOINT)[0]


def counted(data: ChatDataset, rows: int) -> np.ndarray:
    """How often each sample is in the first rows, read row by row as training does."""
    return np.bincount(np.concatenate([data.samples_of(row) for row in range(rows)]), minlength=data.num_samples)


@pytest.mark.parametrize("epochs", [1, 2, 5])
def test_without_packing_each_sample_comes_so_often(tmp_path, epochs):
    data = dataset(tmp_path, packing=False)
    assert counted(data, data.rows_of(epochs)).tolist() == [epochs] * len(LENGTHS)


@pytest.mark.parametrize("epochs", [1, 2, 5])
def test_with_packing_what_is_missing_is_the_row_that_moves_on(tmp_path, epochs):
    data = dataset(tmp_path)
    missing = epochs - counted(data, data.rows_of(epochs))
    assert missing.min() == 0 and (missing * (np.array(LENGTHS) - 1)).sum() < 0.9 * 32
    assert data.epochs_of(data.rows_of(epochs)) == epochs


def test_a_part_of_an_epoch(tmp_path):
    data = dataset(tmp_path, packing=False)
    assert data.rows_of(0.5) == 7 and data.rows_of(1.5) == 20 and data.rows_of(0.01) == 1
    assert data.epochs_of(26) == 2 and data.epochs_of(20) == pytest.approx(20 / 13)


def test_an_epoch_of_several_sets_in_shares_is_as_long_as_all_together(tmp_path):
    one, other = write(tmp_path / "a-train", [9] * 30), write(tmp_path / "b-train", [9] * 10)
    data = Data([one, other], seq_length=32, packing=False, data_weights=[0.5, 0.5], data_cache_path="none")
    mixed = make_datasets(data, CHECKPOINT)[0]
    times = counted(mixed, mixed.rows_of(1))
    assert mixed.rows_of(1) == 40 and times[:30].sum() == 20 and times[30:].tolist() == [2] * 10


def test_many_samples_are_not_planned_ahead(tmp_path, monkeypatch):
    data = dataset(tmp_path, packing=False)
    monkeypatch.setattr(data, "locate", lambda _: pytest.fail("planned"))
    assert data.rows_of(10**6) == 13 * 10**6 and data.epochs_of(13 * 10**6) == 10**6


def settings(epochs: float, rows: int | None = None, **optimizer) -> TrainingSettings:
    batch = Batch(micro_batch_size=2, global_batch_size=rows, epochs=epochs)
    return TrainingSettings(batch=batch, optimizer=Optimizer(**optimizer))


@pytest.mark.parametrize("rows, world, steps", [(4, 1, 10), (13, 1, 3), (100, 1, 1), (None, 1, 20), (None, 2, 10)])
def test_steps_are_rows_by_batch_rounded_up(tmp_path, rows, world, steps):
    made = length.with_steps(settings(3, rows), dataset(tmp_path, packing=False), world)
    assert made.batch.train_iters == steps and made.batch.epochs is None


def test_a_warm_up_beyond_the_steps_is_refused(tmp_path):
    data = dataset(tmp_path, packing=False)
    with pytest.raises(ConfigError, match=r"--lr_warmup_iters 10 leaves nothing of the 10 step.*--epochs"):
        length.with_steps(settings(3, 4, lr_warmup_iters=10), data, 1)
    assert length.with_steps(settings(3, 4, lr_warmup_iters=9), data, 1).batch.train_iters == 10


@pytest.mark.parametrize(
    "optimizer, first",
    [({}, 1), ({"lr_decay_iters": 50}, 5), ({"lr_warmup_fraction": 0.26}, 3), ({"lr_warmup_fraction": 0.0}, 0)],
)  # fmt: skip
def test_a_share_of_the_steps_is_the_warm_up(tmp_path, optimizer, first):
    given = settings(3, 4, **{"lr_warmup_fraction": 0.1} | optimizer)
    made = length.with_steps(given, dataset(tmp_path, packing=False), 1)
    assert (made.batch.train_iters, made.optimizer.lr_warmup_iters, made.optimizer.lr_warmup_fraction) == (
        10,
        first,
        None,
    )


def test_the_warm_up_is_given_once():
    with pytest.raises(ConfigError, match=r"--lr_warmup_fraction 0\.1 and --lr_warmup_iters 3 both give"):
        warmup_given_once(Optimizer(lr_warmup_fraction=0.1, lr_warmup_iters=3))


NEEDED = ["--load", "x", "--data_path", "y"]


def read(*words: str) -> Batch:
    return parse(finetune.COMMAND, [*NEEDED, *words])[0].batch


def test_the_command_line_wins_over_a_file(tmp_path):
    file = tmp_path / "training.yaml"
    file.write_text("train_iters: 90\n")
    assert read("--config", str(file), "--epochs", "2") == Batch(epochs=2)
    assert read("--config", str(file)) == Batch(train_iters=90)
    file.write_text("epochs: 2\n")
    assert read("--config", str(file), "--train_iters", "7") == Batch(train_iters=7)
    assert read("--config", str(file)) == Batch(epochs=2)
