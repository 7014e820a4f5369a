"""What a user is told about how a run goes: a doubtful rate before it, the time left, steps that changed nothing."""

import pytest

from megatron_ft.config.schedule import doubtful_rate
from megatron_ft.config.sections import Optimizer
from megatron_ft.training.console import duration
from megatron_ft.training.stopping import MostlySkipped, Skipped


@pytest.mark.parametrize("lr", [1e5, 2.0, 0.02, 1e-9])
def test_a_doubtful_rate(lr):
    assert f"--lr {lr:g} " in doubtful_rate(Optimizer(lr=lr)) and "usual are 1e-6 to 1e-4" in doubtful_rate(
        Optimizer(lr=lr)
    )


@pytest.mark.parametrize("lr", [1e-2, 1e-3, 2e-5, 1e-7])
def test_usual_rates(lr):
    assert doubtful_rate(Optimizer(lr=lr)) is None


@pytest.mark.parametrize(
    ("seconds", "text"),
    [
        (0.4, "00:00:00"), (59.9, "00:00:59"), (3661, "01:01:01"), (86399, "23:59:59"), (86400, "1 d 00:00:00"),
        (119 * 3600, "4 d 23:00:00"), (400 * 86400 + 1, "400 d 00:00:01"),
    ],
)  # fmt: skip
def test_the_time_left(seconds, text):
    assert duration(seconds) == text


def skipped(**numbers) -> Skipped:
    """Skipped after so many steps of each kind; `done` were not skipped."""
    found = Skipped()
    for kind, number in numbers.items():
        for _ in range(number):
            metrics = {
                "train/skipped": int(kind != "done"),
                "train/overflow": int(kind == "overflow"),
                "train/empty": int(kind == "empty"),
            }
            assert found.count(metrics) is (kind == "broken")
    return found


@pytest.mark.parametrize(
    "numbers", [{}, {"done": 4}, {"done": 2, "broken": 2}, {"done": 2, "broken": 1, "empty": 1, "overflow": 0}]
)
def test_a_run_that_trained(numbers):
    assert skipped(**numbers).judge(1e-5) is None


@pytest.mark.parametrize(
    ("numbers", "message"),
    [
        ({"done": 1, "broken": 3}, r"^3 of 4 steps were skipped .* 3 with gradients that are not finite: .* --lr \(it was 100000\)$"),
        ({"empty": 2}, r"^2 of 2 steps were skipped .* 2 without a token to train on: check the loss weights"),
        ({"done": 1, "broken": 1, "empty": 1}, r"1 with gradients that .*, 1 without a token"),
    ],
)  # fmt: skip
def test_a_run_whose_steps_changed_nothing(numbers, message):
    with pytest.raises(MostlySkipped, match=message):
        skipped(**numbers).judge(1e5)


def test_a_loss_scale_that_found_its_height_too_late():
    said = skipped(done=1, overflow=9).judge(1e-5)
    assert said.startswith(
        "9 of 10 steps were skipped while the fp16 loss scale was too high; train longer, use --bf16"
    )
