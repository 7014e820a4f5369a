"""Charts that are read in grey and by their axes: marks that differ, ticks over the whole axis, names that are not cut short."""

import re

import pytest

from megatron_ft.report.by_length import by_length
from megatron_ft.report.marks import COLOURS, DASHES, mark, stroke
from megatron_ft.report.perplexity_page import chart
from megatron_ft.report.several import _Area, overlay
from megatron_ft.report.two_axes import Axis
from megatron_ft.report.two_axes import chart as two_axes


def test_lines_differ_without_their_colours():
    def grey(text):
        return re.sub("#[0-9a-f]{6}", "", text)

    assert len({grey(mark(n, 0, 0)) for n in range(len(COLOURS))}) == len(COLOURS)
    assert len({grey(stroke(n)) for n in range(len(DASHES))}) == len(DASHES) == len(COLOURS)


@pytest.mark.parametrize(("low", "high"), [(0.15, 6.0), (2.0, 7.0), (0.01, 300.0), (5.1, 5.3), (1e-4, 2e3)])
def test_ticks_reach_over_a_logarithmic_axis(low, high):
    ticks = _Area.of([(1, low), (2, high)]).ticks()
    assert 3 <= len(ticks) <= 12
    assert min(ticks) <= low * (high / low) ** 0.35 and max(ticks) >= high / (high / low) ** 0.35


def test_one_value_stands_in_the_middle():
    svg = overlay("validation loss", [("a", [(300.0, 7.0)])], "step", "nats")
    (start,) = re.findall(r'class="line n1" d="M([\d.]+) [\d.]+m-6 0h12"', svg)
    assert 250 < float(start) < 320


def test_names_of_models_and_large_perplexities_are_written_out():
    svg = chart([512, 1024], {"airophin-13b-scaled-16k": [6.0, 9000.0]})
    assert "airophin-13b-scaled-16k" in svg and ">10,000<" in svg
    assert "airophin-13b-scaled-16k" in by_length("t", [512], {"airophin-13b-scaled-16k": [0.5]}, "length", "right")


def test_memory_has_more_than_two_ticks():
    svg = two_axes("m", ["16", "8", "4"], "weights", Axis("GB", [85.0, 45.0, 26.0]), Axis("s", [12.0, 21.0, 145.0]))
    assert all(f'text-anchor="end">{value}<' in svg for value in (20, 40, 60, 80))
