"""Assigns samples to training or validation, or leaves them out, from counts alone and before tokenization.

Samples come in groups (a message tree, or one chat), and a group is never in both splits. All choices are random but seeded: the same
counts, settings and seed give the same choice.
"""

import math
from dataclasses import dataclass
from typing import Literal

import numpy as np

from megatron_ft.errors import ConfigError

OUT, TRAIN, VAL = 0, 1, 2
MARK = 4  # bit in a sample's split: its text is marked for language-modelling loss
SPLITS = {"train": TRAIN, "val": VAL}


@dataclass(frozen=True)
class SplitOptions:
    """Configuration keys of every dataset."""

    val_split: float = 0.2
    """Share of the groups for validation; 0: none."""
    val_rounding: Literal["down", "up"] = "down"
    """Rounding of their number; default: up for the named datasets, as Open-Assistant's pretokenizer does it, else down."""
    max_val_set: int | None = None
    """Largest number of validation samples."""
    manual_seed: int | None = None
    """Seed of this dataset's split and sample; default: the section's rng_seed."""
    fraction: float | None = None
    """Share of the training samples to take."""
    size: int | None = None
    """Number of training samples to take."""
    marked_prompts: float | None = None
    """Share of the samples whose prompts are marked for language-modelling loss; default: 0, for plain text 1."""
    share: float | None = None
    """Share of the mix, if the section has mix_by."""

    def check(self, name: str) -> None:
        """Raise ConfigError for a value out of range."""
        if not 0 <= self.val_split < 1:
            raise ConfigError(f"dataset {name}: val_split is {self.val_split}; give a share of at least 0 and below 1")
        if self.fraction is not None and not 0 < self.fraction <= 1:
            raise ConfigError(f"dataset {name}: fraction is {self.fraction}; give a share above 0 and up to 1")
        if self.fraction is not None and self.size is not None:
            raise ConfigError(f"dataset {name}: fraction {self.fraction} and size {self.size}; give one of them")
        if self.marked_prompts is not None and not 0 <= self.marked_prompts <= 1:
            raise ConfigError(f"dataset {name}: marked_prompts is {self.marked_prompts}; give a share from 0 to 1")
        if self.share is not None and self.share <= 0:
            raise ConfigError(f"dataset {name}: share is {self.share}; give a number above 0")
        if self.manual_seed is not None and self.manual_seed < 0:
            raise ConfigError(f"dataset {name}: manual_seed is {self.manual_seed}; give a number that is not negative")
        for key in ("size", "max_val_set"):
            if (value := getattr(self, key)) is not None and value < 1:
                raise ConfigError(f"dataset {name}: {key} is {value}; give a number above 0, or leave it out")


@dataclass(frozen=True)
class Plan:
    """The assignment. split: OUT, TRAIN or VAL of every sample, uint8 [samples]. available: samples of each split before sampling."""

    split: np.ndarray
    available: dict[str, int]


def plan(group_sizes: np.ndarray, options: SplitOptions, rng: np.random.Generator) -> Plan:
    """Split the groups, then sample. group_sizes: samples in each group [groups]; groups without samples are ignored.

    With a val_split above 0, both splits have at least one group, if there are two or more.
    """
    groups = np.flatnonzero(group_sizes)
    exact = len(groups) * options.val_split
    count = math.ceil(exact) if options.val_rounding == "up" else int(exact)
    if options.val_split > 0 and len(groups) > 1:
        count = max(count, 1)
    by_group = np.full(len(group_sizes), TRAIN, np.uint8)
    by_group[rng.permutation(groups)[:count]] = VAL
    split = np.repeat(by_group, group_sizes)
    train, val = np.flatnonzero(split == TRAIN), np.flatnonzero(split == VAL)
    wanted = options.size if options.fraction is None else int(len(train) * options.fraction)
    for samples, limit in ((train, wanted), (val, options.max_val_set)):
        if limit is not None and limit < len(samples):
            split[rng.permutation(samples)[limit:]] = OUT
    return Plan(split, {"train": len(train), "val": len(val)})


def cap(plans: list[Plan], max_count: int | None) -> None:
    """Keep at most the first max_count samples of each split over all datasets, for a trial run."""
    for number in (TRAIN, VAL):
        left = max_count
        for one in plans:
            if left is None:
                return
            chosen = np.flatnonzero(one.split == number)
            one.split[chosen[left:]] = OUT
            left -= min(left, len(chosen))
