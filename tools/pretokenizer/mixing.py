"""Mixing of datasets: how often each sample is taken, so that each dataset has its requested share.

Shares are of samples, of tokens or of the assistant's tokens. A dataset that is too small for its share is repeated: whole epochs
first, then a random part. If repeats are not allowed, the smallest dataset relative to its share limits the size of the mix.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from megatron_ft.config.hints import alternatives
from megatron_ft.errors import ConfigError, DataError

UNITS = ("samples", "tokens", "assistant_tokens")


@dataclass(frozen=True)
class Portion:
    """One dataset's part of the mix. picks: its samples in order, repeated for each epoch. units: their total."""

    name: str
    requested: float
    realised: float
    epochs: float
    picks: np.ndarray
    units: int


def check(mix_by: str | None, total: int | None, max_epochs: float) -> None:
    """Raise ConfigError for invalid settings of a mix."""
    if mix_by is not None and mix_by not in UNITS:
        raise ConfigError(f"mix_by is {mix_by}; choose one of {', '.join(UNITS)}{alternatives(mix_by, UNITS)}")
    if total is not None and (mix_by is None or total < 1):
        raise ConfigError(f"mix_total is {total}: give a number above 0, and mix_by: {', '.join(UNITS)}")
    if max_epochs <= 0:
        raise ConfigError(f"mix_max_epochs is {max_epochs}; give a number above 0")


def select(
    names: Sequence[str],
    units: Sequence[np.ndarray],
    shares: Sequence[float],
    total: int | None,
    max_epochs: float,
    generators: Sequence[np.random.Generator],
) -> list[Portion]:
    """Return each dataset's portion. units: of each sample of each dataset [samples]. total: units of the whole mix; None: the largest
    mix in which no dataset exceeds max_epochs.

    Raise DataError for a dataset without samples, or one too small for the total within max_epochs.
    """
    requested = np.array(shares, float) / sum(shares)
    available = np.array([int(one.sum()) for one in units])
    for name, have in zip(names, available, strict=True):
        if not have:
            raise DataError(f"dataset {name}: no samples are left to mix; remove it, or relax the selection")
    if total is None:
        total = int((available * max_epochs / requested).min())
    epochs = requested * total / available
    for name, times in zip(names, epochs, strict=True):
        if times > max_epochs * (1 + 1e-9):
            raise DataError(
                f"dataset {name}: its share of {total} needs {times:.2f} epochs, but mix_max_epochs is {max_epochs:g}; "
                "increase mix_max_epochs, decrease mix_total or the share, or add data"
            )
    picks = [_pick(one, float(times), rng) for one, times, rng in zip(units, epochs, generators, strict=True)]
    got = [int(one[chosen].sum()) for one, chosen in zip(units, picks, strict=True)]
    whole = max(1, sum(got))
    return [
        Portion(name, float(share), mine / whole, mine / int(have), chosen, mine)
        for name, share, mine, have, chosen in zip(names, requested, got, available, picks, strict=True)
    ]


def _pick(units: np.ndarray, epochs: float, rng: np.random.Generator) -> np.ndarray:
    """Return each sample as often as needed: whole epochs, then the random part that comes closest."""
    full = int(epochs + 1e-9)
    rest = (epochs - full) * float(units.sum())
    order = rng.permutation(len(units))
    reached = np.concatenate([[0], np.cumsum(units[order])])
    part = np.sort(order[: int(np.argmin(np.abs(reached - rest)))]) if rest > 0.5 else order[:0]
    return np.concatenate([*[np.arange(len(units))] * full, part]).astype(np.int64)


def report(portions: Sequence[Portion], mix_by: str) -> str:
    """Return a table in Markdown."""
    head = ("dataset", "requested", "actual", "epochs", "samples", mix_by.replace("_", " "))
    rows = [
        (p.name, f"{p.requested:.1%}", f"{p.realised:.1%}", f"{p.epochs:.3f}", str(len(p.picks)), str(p.units))
        for p in portions
    ]
    widths = [max(len(row[i]) for row in (head, *rows)) for i in range(len(head))]
    lines = ["| " + " | ".join(c.ljust(w) for c, w in zip(row, widths, strict=True)) + " |" for row in (head, *rows)]
    lines.insert(1, "|" + "|".join("-" * (width + 2) for width in widths) + "|")
    return "\n".join(lines) + "\n"
