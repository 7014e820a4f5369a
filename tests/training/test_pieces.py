"""The small parts of training, each against something we did not write."""

import io
import json
import math

import pytest
import torch

from megatron_ft.config import checks
from megatron_ft.config.sections import Batch, Optimizer
from megatron_ft.config.settings import TrainingSettings
from megatron_ft.errors import ConfigError
from megatron_ft.training.console import Console
from megatron_ft.training.hooks import MetricsFile


def test_fused_adam_is_torch_adamw():
    """Ten updates of our optimizer against torch.optim.AdamW: the same to the bit, state included."""
    from megatron_ft.engine.optimizer import FusedAdam

    torch.manual_seed(0)
    start = [torch.randn(7, 5), torch.randn(5)]
    settings = {"lr": 1e-2, "betas": (0.9, 0.95), "eps": 1e-8, "weight_decay": 0.1}
    ours, theirs = ([torch.nn.Parameter(p.clone()) for p in start] for _ in range(2))
    optimizers = FusedAdam(ours, **settings), torch.optim.AdamW(theirs, **settings, fused=True)
    for _ in range(10):
        for a, b in zip(ours, theirs, strict=True):
            a.grad = torch.randn_like(a)
            b.grad = a.grad.clone()
        for optimizer in optimizers:
            optimizer.step()
    for a, b in zip(ours, theirs, strict=True):
        assert torch.equal(a, b)
        assert torch.equal(optimizers[0].state[a]["exp_avg_sq"], optimizers[1].state[b]["exp_avg_sq"])
    assert optimizers[0].param_groups[0]["step"] == 10


def scheduled(section: Optimizer, steps: int, name: str = "lr") -> list[float]:
    """Return what a parameter group has in each step."""
    from megatron_ft.engine.optimizer import FusedAdam, make_schedule

    adam = FusedAdam([torch.nn.Parameter(torch.zeros(1))])
    adam.param_groups[0].update(max_lr=section.lr, min_lr=section.min_lr, wd_mult=1.0)
    schedule = make_schedule(adam, section, Batch(train_iters=steps))
    found = []
    for _ in range(steps):
        found.append(adam.param_groups[0][name])
        schedule.step(increment=1)
    return found


def of_transformers(name: str, steps: int, **options) -> list[float]:
    """Return the rates of a schedule of transformers, whose highest rate is 1."""
    import transformers

    adam = torch.optim.AdamW([torch.nn.Parameter(torch.zeros(1))], lr=1.0)
    schedule = getattr(transformers, name)(adam, **options)
    found = []
    for _ in range(steps):
        found.append(schedule.get_last_lr()[0])
        adam.step()
        schedule.step()
    return found


def test_schedule_is_linear_then_cosine():
    rates = scheduled(Optimizer(lr=1.0, min_lr=0.1, lr_warmup_iters=4), 20)
    expected = [i / 4 for i in range(4)]
    expected += [0.1 + 0.9 * 0.5 * (1 + math.cos(math.pi * (i - 4) / 16)) for i in range(4, 20)]
    assert rates == pytest.approx(expected)


@pytest.mark.parametrize(
    ("style", "theirs"), [("linear", "linear"), ("cosine", "cosine"), ("minus_sqrt", "1-sqrt")]
)  # fmt: skip
def test_wsd_is_that_of_transformers(style, theirs):
    section = Optimizer(
        lr=1.0, min_lr=0.1, lr_decay_style="WSD", lr_wsd_decay_style=style, lr_wsd_decay_iters=8, lr_warmup_iters=4
    )  # fmt: skip
    expected = of_transformers(
        "get_wsd_schedule", 20, num_warmup_steps=4, num_decay_steps=8, num_training_steps=20, decay_type=theirs, min_lr_ratio=0.1
    )  # fmt: skip
    assert scheduled(section, 20)[4:] == pytest.approx(expected[4:])


def test_wsd_halves_from_twice_the_rate_by_default():
    """2 x 0.5^t - 1 falls from 1 to 0, as in Megatron-LM's arguments."""
    rates = scheduled(Optimizer(lr=1.0, lr_decay_style="WSD", lr_wsd_decay_iters=10), 20)
    assert rates[:11] == [1.0] * 11
    assert rates[11:] == pytest.approx([2 * 0.5 ** (i / 10) - 1 for i in range(1, 10)])


def test_inverse_square_root_is_that_of_transformers():
    rates = scheduled(Optimizer(lr=1.0, lr_decay_style="inverse-square-root", lr_warmup_iters=4), 20)
    assert rates == pytest.approx(of_transformers("get_inverse_sqrt_schedule", 20, num_warmup_steps=4))


def test_the_warmup_rises_from_its_own_rate():
    rates = scheduled(Optimizer(lr=1.0, lr_warmup_init=0.2, lr_warmup_iters=4, lr_decay_style="constant"), 6)
    assert rates == pytest.approx([0.2, 0.4, 0.6, 0.8, 1.0, 1.0])


@pytest.mark.parametrize(("style", "quarter"), [("linear", 0.25), ("cosine", 0.5 * (1 - math.cos(math.pi / 4)))])
def test_weight_decay_rises(style, quarter):
    """`quarter`: what is done of the way after a quarter of the steps."""
    section = Optimizer(weight_decay_incr_style=style, start_weight_decay=0.1, end_weight_decay=0.3)
    decays = scheduled(section, 20, "weight_decay")
    assert decays[0] == pytest.approx(0.1) and decays[5] == pytest.approx(0.1 + 0.2 * quarter)
    assert decays == sorted(decays)


@pytest.mark.parametrize("method", ["default", "linear", "llama3"])
def test_rope_frequencies_are_transformers(method):
    from transformers import LlamaConfig
    from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

    from megatron_ft.models.rope import inverse_frequencies

    scaling = {
        "rope_type": method, "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0,
        "original_max_position_embeddings": 8192,
    }  # fmt: skip
    ours = inverse_frequencies(128, 5e5, scaling, 131072)
    config = LlamaConfig(
        hidden_size=4096, num_attention_heads=32, head_dim=128, max_position_embeddings=131072,
        rope_parameters={**scaling, "rope_theta": 5e5},
    )  # fmt: skip
    if method == "default":
        theirs = 1.0 / (5e5 ** (torch.arange(0, 128, 2).float() / 128))
    else:
        theirs = ROPE_INIT_FUNCTIONS[method](config, device="cpu")[0]
    torch.testing.assert_close(ours, theirs, rtol=1e-6, atol=0)


def step_metrics(loss=2.0, skipped=0):
    return {
        "train/loss": loss, "train/lr": 1e-3, "train/grad_norm": 1.5, "train/seconds": 0.5, "train/tokens": 100,
        "train/supervised_tokens": 40, "train/global_batch_size": 8, "train/consumed_samples": 80, "train/skipped": skipped,
    }  # fmt: skip


def test_progress_line_is_megatrons():
    """The fields and their order that people grep for, averaged over the interval."""
    out = io.StringIO()
    console = Console(train_iters=500, log_interval=2, out=out)
    console.on_step(9, step_metrics(loss=3.0, skipped=1))
    console.on_step(10, step_metrics(loss=2.0))
    line = out.getvalue()
    names = [part.split(":")[0].strip() for part in line.split("|")]
    assert names[:3] == ["iteration  10/ 500", "consumed samples", "elapsed time per iteration (ms)"]
    assert "learning rate: 1.000E-03 | global batch size:     8 | lm loss: 2.500000E+00 | grad norm: 1.500" in line
    assert "number of skipped iterations: 1 | number of nan iterations: 0" in line
    assert "tokens/s: 200 | trained tokens/s: 80 | eta: 00:04:05" in line
    assert line.count("\n") == 1


def test_the_time_left_has_days():
    """12,000 steps of 36 s take 119 hours and more."""
    out = io.StringIO()
    Console(train_iters=12_000, log_interval=1, out=out).on_step(1, {**step_metrics(loss=3.0), "train/seconds": 36.0})
    assert "| eta: 4 d 23:59:24 |" in out.getvalue()


def test_the_printed_loss_leaves_out_steps_without_a_supervised_token():
    """Their loss is 0, of nothing."""
    out = io.StringIO()
    console = Console(train_iters=500, log_interval=2, out=out)
    empty = {**step_metrics(loss=0.0, skipped=1), "train/empty": 1}
    for iteration, metrics in enumerate((step_metrics(loss=3.0), empty, empty, empty), 1):
        console.on_step(iteration, metrics)
    first, second = out.getvalue().splitlines()
    assert "| lm loss: 3.000000E+00 |" in first and "| lm loss: none (no supervised token) |" in second


def test_a_report_leaves_them_out_too(tmp_path):
    from megatron_ft.report.metrics import read_metrics

    rows = [
        {"iteration": 1, "train/loss": 3.0, "train/empty": 0},
        {"iteration": 2, "train/loss": 0.0, "train/empty": 1},
    ]
    (tmp_path / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    assert read_metrics(tmp_path / "metrics.jsonl").curve("train/loss") == [(1, 3.0)]


def test_metrics_file_is_strict_json_even_for_nan(tmp_path):
    metrics = MetricsFile(tmp_path)
    metrics.on_step(1, step_metrics(loss=float("nan")))
    metrics.on_end()
    (line,) = (tmp_path / "metrics.jsonl").read_text().splitlines()
    assert json.loads(line, parse_constant=pytest.fail)["train/loss"] is None


REFUSED = [
    ({"tensor_model_parallel_size": 2, "pipeline_model_parallel_size": 3}, 4, "--nproc_per_node 6"),
    ({"micro_batch_size": 3, "global_batch_size": 8}, 1, "--global_batch_size 6 or 9"),
    ({"micro_batch_size": 2, "global_batch_size": 8}, 3, "data-parallel size 3 = 6"),
    ({"sequence_parallel": True, "tensor_model_parallel_size": 2, "seq_length": 65}, 2, "--seq_length 64"),
    ({"lr": 0.0}, 1, "must be above 0"),
    ({"min_lr": 1.0}, 1, "lower --min_lr"),
    ({"lr_warmup_iters": 10, "train_iters": 10}, 1, "at most 9"),
    ({"hidden_dropout": 1.0}, 1, "less than 1"),
    ({"lima_dropout": True}, 1, "set --hidden_dropout"),
    ({"save_interval": 5}, 1, "--save"),
    ({"seq_length": 0}, 1, "at least 1"),
    ({"data_weights": [0.5, 0.5]}, 1, "2 share"),
    ({"data_weights": [-1.0]}, 1, "must not be negative"),
    ({"role_loss_weights": ["user:1"]}, 1, "name=number"),
    ({"variable_seq_lengths": True}, 1, "--no_packing"),
]


@pytest.mark.parametrize(("settings", "world", "message"), REFUSED)
def test_settings_that_do_not_fit_are_refused(settings, world, message):
    values = {"load": "x", "data_path": ["y"], "train_iters": 100} | settings
    with pytest.raises(ConfigError, match=message):
        checks.check_settings(TrainingSettings.of(**values), world_size=world)
