"""The measurements as a table, and what they say about 4 bits against 8."""

from __future__ import annotations

from collections.abc import Sequence

from megatron_ft.evaluation.measuring.job import Measured

HEAD = ("bits", "format", "weights, GB", "load, s", "peak at load, GB", "peak of a run, GB", "s per run", "tokens/s")


def rows(results: Sequence[Measured]) -> list[tuple[str, ...]]:
    """Return the cells of each configuration, in the columns of HEAD."""
    return [_row(one) for one in results]


def _row(one: Measured) -> tuple[str, ...]:
    if one.failed:
        return (str(one.bits), one.kind, *[""] * 5, f"failed: {one.failed}")
    return (
        str(one.bits), one.kind, gb(one.weight_bytes), f"{one.load_seconds:.1f}", gb(one.load_peak_bytes), gb(one.peak_bytes),
        f"{one.seconds:.2f}", f"{one.tokens_per_second:.2f}",
    )  # fmt: skip


def gb(count: int) -> str:
    """Return bytes in GB (1e9), with three digits."""
    value = count / 1e9
    return (
        f"{value:.0f}"
        if value >= 100
        else f"{value:.1f}"
        if value >= 10
        else f"{value:.2f}"
        if value >= 0.1
        else f"{value:.4f}"
    )


def text_table(results: Sequence[Measured]) -> str:
    """Return the table for a terminal; the reason of a failure stands after the row's format."""
    lines = [HEAD, *rows(results)]
    widths = [max(len(line[n]) for line in lines if not line[-1].startswith("failed")) for n in range(len(HEAD))]
    widths[1] = max(len(line[1]) for line in lines)
    return "\n".join(_line(line, widths) for line in lines)


def _line(cells: Sequence[str], widths: Sequence[int]) -> str:
    start = f"{cells[0]:>{widths[0]}}  {cells[1]:<{widths[1]}}"
    if cells[-1].startswith("failed"):
        return f"{start}  {cells[-1]}"
    return "  ".join([start, *(f"{cell:>{width}}" for cell, width in zip(cells[2:], widths[2:], strict=True))])


def verdict_of_four(results: Sequence[Measured]) -> str | None:
    """Return whether 4 bits were slower than 8, and why as far as the products show it; without 8 bits than the next precision.

    None unless 4 bits and another precision were measured.
    """
    by = {one.bits: one for one in results if not one.failed}
    four, others = by.get(4), [by[bits] for bits in sorted(by) if bits > 4]
    if four is None or not others:
        return None
    other = others[0]
    seconds = f"{four.seconds:.2f} s against {other.seconds:.2f} s per run"
    if four.seconds <= other.seconds:
        return f"4 bits were not slower than {other.bits} here: {seconds}."
    return f"4 bits took {four.seconds / other.seconds:.2g} times as long as {other.bits}: {seconds}. {_reason(four, other)}"


def _reason(four: Measured, other: Measured) -> str:
    if not four.product or not other.product:
        return "No product was timed."
    shape = " x ".join(map(str, four.product.shape))
    times = (
        f"one token through the largest linear ({shape}) takes {four.product.ms:.3g} ms in 4 bits, {other.product.ms:.3g} ms in "
        f"{other.bits}"
    )
    if four.product.ms <= other.product.ms:
        return f"The products of the linears are not the reason: {times}."
    made = four.product.dequantise_ms
    how = f"; making its plain weight alone takes {made:.3g} ms" if made is not None else ""
    integers = "; weights in 8 bits are multiplied as integers" if other.bits == 8 else ""
    return f"The products are the reason: {times}{how}. No hardware multiplies weights in 4 bits: they are converted each time{integers}."
