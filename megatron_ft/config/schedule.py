"""Rules of the learning rate, the weight decay and their schedules: one function per rule, as in checks.py."""

from __future__ import annotations

import math

from megatron_ft.config.sections import Batch, Optimizer
from megatron_ft.errors import ConfigError
from megatron_ft.wording import counted


def rates_in_order(optimizer: Optimizer) -> None:
    if not 0 < optimizer.lr < math.inf:
        raise ConfigError(f"--lr {optimizer.lr}: must be above 0")
    for name in ("min_lr", "lr_warmup_init"):
        value = getattr(optimizer, name)
        if value > optimizer.lr:
            raise ConfigError(f"--{name} {value} is above --lr {optimizer.lr}: lower --{name}")


USUAL_RATES = (1e-8, 1e-2)
"""AdamW moves each weight by about the rate in a step, and weights are about 0.02: above, they are lost; below, they do not move."""


def doubtful_rate(optimizer: Optimizer) -> str | None:
    """Return a warning about a learning rate that hardly any run wants."""
    low, high = USUAL_RATES
    if low <= optimizer.lr <= high:
        return None
    what = (
        "moves every weight further than its own size in a step" if optimizer.lr > high else "hardly changes a weight"
    )
    return f"--lr {optimizer.lr:g} {what} with AdamW; usual are 1e-6 to 1e-4, with --lora_rank to 1e-3: check --lr"


def warmup_given_once(optimizer: Optimizer) -> None:
    """Check the share of the steps that are the warm-up."""
    share = optimizer.lr_warmup_fraction
    if share is None:
        return
    if not 0 <= share < 1:
        raise ConfigError(f"--lr_warmup_fraction {share:g}: must be at least 0 and less than 1")
    if optimizer.lr_warmup_iters:
        raise ConfigError(
            f"--lr_warmup_fraction {share:g} and --lr_warmup_iters {optimizer.lr_warmup_iters} both give the warm-up: keep one"
        )


def warmup_fits(optimizer: Optimizer, batch: Batch) -> None:
    """Check the warm-up. With --epochs the steps are known only once the data is read; training/length.py then checks it."""
    decay = optimizer.lr_decay_iters or batch.train_iters
    if decay and optimizer.lr_warmup_iters >= decay:
        raise ConfigError(
            f"--lr_warmup_iters {optimizer.lr_warmup_iters} leaves nothing of the {counted(decay, 'step')} of the schedule: "
            f"use at most {decay - 1}, or train for more steps (--train_iters, --epochs)"
        )


def wsd_fits(optimizer: Optimizer, batch: Batch) -> None:
    steps = optimizer.lr_wsd_decay_iters
    if optimizer.lr_decay_style != "WSD":
        if steps is not None:
            raise ConfigError("--lr_wsd_decay_iters is for --lr_decay_style WSD: add it, or drop --lr_wsd_decay_iters")
        return
    if steps is None:
        raise ConfigError(
            "--lr_decay_style WSD needs --lr_wsd_decay_iters: add the number of its last steps, which decay"
        )
    decay = optimizer.lr_decay_iters or batch.train_iters
    most = decay - optimizer.lr_warmup_iters
    if decay and steps > most:
        raise ConfigError(
            f"--lr_wsd_decay_iters {steps}: the schedule has {counted(most, 'step')} after the warm-up: "
            f"use at most {most}, or train for more steps (--train_iters, --epochs)"
        )


def weight_decay_rises(optimizer: Optimizer) -> None:
    start, end, style = optimizer.start_weight_decay, optimizer.end_weight_decay, optimizer.weight_decay_incr_style
    if style == "constant":
        if start is not None or end is not None:
            raise ConfigError(
                "--start_weight_decay and --end_weight_decay need --weight_decay_incr_style linear or cosine: "
                "add it, or give --weight_decay alone"
            )
        return
    if start is None or end is None:
        raise ConfigError(
            f"--weight_decay_incr_style {style} needs --start_weight_decay and --end_weight_decay: add both"
        )
    if start > end:
        raise ConfigError(f"--start_weight_decay {start} is above --end_weight_decay {end}: weight decay can only rise")
