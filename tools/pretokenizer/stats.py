"""Statistics of accepted and skipped samples: counted while they are written, reported as a table and as JSON.

Skipped samples are counted by reason and in tokens. A dataset without accepted samples has a row too.
"""

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import numpy as np

from megatron_ft.data import packing
from megatron_ft.data.roles import (
    ALL_NAMES,
    MARKED,
    ROLE_BITS,
    all_weights,
    are_spoken,
    byte_weights,
    display_name,
)
from megatron_ft.data.shards import named_counts

HEADINGS = ("dataset", "samples (fraction)", "accepted", "accepted tokens", "skipped", "min", "max", "avg")
BOUNDS = np.array(sorted({round(2.0 ** (step / 2)) for step in range(61)}))  # two bars per doubling of the length


class RoleCounts(NamedTuple):
    """How many tokens with each role byte samples have. kinds: the role bytes that occur, uint8 [kinds]; counts: int64 [samples, kinds]."""

    kinds: np.ndarray
    counts: np.ndarray


def count_roles(role_bytes: np.ndarray, lengths: np.ndarray) -> RoleCounts:
    """Count the role bytes of concatenated samples."""
    ends = np.cumsum(lengths)
    changes = np.flatnonzero(np.diff(role_bytes)) + 1
    bounds = np.sort(
        np.concatenate([[0], changes, ends])
    )  # of stretches of one role byte in one sample, some of them empty
    starts, sizes = bounds[:-1][np.diff(bounds) > 0], np.diff(bounds)[np.diff(bounds) > 0]
    kinds = np.flatnonzero(np.bincount(role_bytes[starts], minlength=256))
    counts = np.zeros((len(lengths), len(kinds)), np.int64)
    np.add.at(counts, (np.searchsorted(ends, starts, side="right"), np.searchsorted(kinds, role_bytes[starts])), sizes)
    return RoleCounts(kinds.astype(np.uint8), counts)


@dataclass
class Tally:
    """One dataset's samples in one split; lengths in tokens. available: number of samples before sampling."""

    name: str
    available: int
    accepted: int = 0
    tokens: int = 0
    shortest: int | None = None
    longest: int | None = None
    skipped: Counter[str] = field(default_factory=Counter)
    skipped_tokens: int = 0
    tokens_by_role: np.ndarray = field(default_factory=lambda: np.zeros(len(ALL_NAMES), np.int64))
    marked_tokens: int = 0
    untrained: int = 0
    """Accepted samples of which no token is trained on by default: none is the assistant's or marked, or the weight is 0."""
    weights: Sequence[float] = (1.0,)
    """The table of message weights."""
    by_role_byte: np.ndarray = field(default_factory=lambda: np.zeros(256, np.int64))
    """Tokens by their byte in the role shard."""
    histogram: np.ndarray = field(default_factory=lambda: np.zeros(len(BOUNDS), np.int64))
    """Accepted samples by length: at least BOUNDS[i] and below BOUNDS[i + 1] tokens."""

    @property
    def samples(self) -> int:
        return self.accepted + self.skipped.total()

    def accept(self, lengths: np.ndarray, roles: RoleCounts) -> np.ndarray:
        """Count samples; lengths are above 0. Return the number of assistant tokens of each."""
        if not len(lengths):
            return np.empty(0, np.int64)
        spoken, marked = are_spoken(roles.kinds), roles.kinds & MARKED > 0
        by_kind = roles.counts.sum(axis=0)
        self.accepted += len(lengths)
        self.tokens += int(lengths.sum())
        self.shortest = min(int(lengths.min()), self.shortest or int(lengths.min()))
        self.longest = max(self.longest or 0, int(lengths.max()))
        np.add.at(self.tokens_by_role, roles.kinds & ROLE_BITS, by_kind)
        self.by_role_byte[roles.kinds] += by_kind
        self.marked_tokens += int(by_kind[marked].sum())
        trained = byte_weights(all_weights(0, {}), self.weights)[roles.kinds] > 0
        self.untrained += int((roles.counts[:, trained].sum(axis=1) == 0).sum())
        self.histogram += np.bincount(np.searchsorted(BOUNDS, lengths, side="right") - 1, minlength=len(BOUNDS))
        return roles.counts[:, spoken].sum(axis=1)

    def skip(self, reasons: Counter[str], tokens: int) -> None:
        self.skipped.update(reasons)
        self.skipped_tokens += tokens

    def row(self) -> list[str]:
        """Return the cells of the table, in the order of HEADINGS."""
        name = self.name + (" (subset)" if self.samples < self.available else "")
        skipped = self.skipped.total()
        return [
            name,
            f"{self.samples} ({_percent(self.samples, self.available)})",
            f"{self.accepted}/{self.samples} ({_percent(self.accepted, self.samples)})",
            str(self.tokens),
            f"{skipped} ({_percent(skipped, self.samples)})" if skipped else "0",
            str(self.shortest or 0),
            str(self.longest or 0),
            f"{self.tokens / self.accepted:.3f}" if self.accepted else "0",
        ]

    def as_json(self) -> dict[str, Any]:
        return {
            "name": self.name,
            "available": self.available,
            "samples": self.samples,
            "accepted": self.accepted,
            "accepted_tokens": self.tokens,
            "skipped": self.skipped.total(),
            "skipped_by_reason": dict(self.skipped),
            "skipped_tokens": self.skipped_tokens,
            "min": self.shortest,
            "max": self.longest,
            "avg": round(self.tokens / self.accepted, 3) if self.accepted else None,
            "tokens_by_role": named_counts(self.tokens_by_role.tolist()),
            "marked_tokens": self.marked_tokens,
            "without_assistant": int(self.untrained),
            "lengths": {str(BOUNDS[i]): int(self.histogram[i]) for i in np.flatnonzero(self.histogram)},
        }


def total(tallies: list[Tally]) -> Tally:
    """Return the sum over all datasets. Those without samples do not change min and max."""
    result = Tally("total", sum(t.available for t in tallies))
    for tally in tallies:
        result.accepted += tally.accepted
        result.tokens += tally.tokens
        result.skipped += tally.skipped
        result.skipped_tokens += tally.skipped_tokens
        result.tokens_by_role = result.tokens_by_role + tally.tokens_by_role
        result.untrained += tally.untrained
        result.by_role_byte = result.by_role_byte + tally.by_role_byte
        result.marked_tokens += tally.marked_tokens
        result.histogram = result.histogram + tally.histogram
    shortest = [t.shortest for t in tallies if t.shortest is not None]
    result.shortest = min(shortest, default=None)
    result.longest = max((t.longest for t in tallies if t.longest is not None), default=None)
    return result


def packing_row(lengths: np.ndarray, seq_length: int) -> dict[str, Any]:
    """Return how samples of these lengths fill rows of one length."""
    sizes = packing.positions(lengths, seq_length)
    rows = packing.best_fit(np.random.default_rng(0).permutation(len(lengths)), sizes, seq_length)
    alone = packing.one_per_row(np.flatnonzero(sizes))
    return {
        "seq_length": seq_length,
        "filled": round(packing.fill(rows, sizes, seq_length), 4),
        "filled_unpacked": round(packing.fill(alone, sizes, seq_length), 4),
        "rows": len(rows),
        "cut": round(float(np.mean(lengths > seq_length + 1)), 4),
    }


def report(tallies: list[Tally]) -> str:
    """Return the table, the roles and the reasons for skipping, as aligned Markdown."""
    whole = total(tallies)
    rows = [list(HEADINGS), *(tally.row() for tally in tallies), [whole.name, *whole.row()[1:]]]
    widths = [max(len(row[column]) for row in rows) for column in range(len(HEADINGS))]
    lines = [
        "| " + " | ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)) + " |" for row in rows
    ]
    lines.insert(1, "|" + "|".join("-" * (width + 2) for width in widths) + "|")
    lines += ["", "tokens by role:"]
    for name, count in named_counts(whole.tokens_by_role.tolist()).items():
        lines.append(f"  {display_name(name)}: {count} ({_percent(count, whole.tokens)})")
    if whole.marked_tokens:
        lines.append(f"  marked: {whole.marked_tokens} ({_percent(whole.marked_tokens, whole.tokens)}), in any role")
    if whole.skipped:
        lines += ["", "skipped:", *(f"  {reason}: {count}" for reason, count in sorted(whole.skipped.items()))]
        lines.append(f"  tokens in skipped samples: {whole.skipped_tokens}")
    return "\n".join(lines) + "\n"


def _percent(part: int, whole: int) -> str:
    return f"{100 * part / whole:.1f}%" if whole else "0.0%"
