"""Learning rates of published recipes, by the size of the model. Data only."""

from __future__ import annotations

from typing import NamedTuple


class Rate(NamedTuple):
    """A learning rate for models of up to so many parameters. source: the recipe that it is taken from."""

    up_to: float
    lr: float
    source: str


FULL = (
    Rate(30e6, 3e-3, "as megatron-ft demo, whose model is as small"),
    Rate(1e9, 5e-5, "the default of transformers' Trainer"),
    Rate(10e9, 2e-5, "as Alpaca and Vicuna, 7 B"),
    Rate(float("inf"), 1e-5, "as Alpaca, 13 B, and Open-Assistant's Llama-2, 70 B"),
)
LORA = (
    Rate(30e6, 3e-3, "as megatron-ft demo, whose model is as small"),
    Rate(30e9, 2e-4, "as QLoRA, 7 B and 13 B"),
    Rate(float("inf"), 1e-4, "as QLoRA, 33 B and 65 B"),
)


def rate(parameters: int, lora: bool) -> Rate:
    """Return the learning rate for a model of this size."""
    return next(one for one in (LORA if lora else FULL) if parameters <= one.up_to)
