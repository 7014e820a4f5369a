"""Axes: enough round values over any range, each with a text of its own."""

import math

import pytest

from megatron_ft.report.curves import log_ticks, names_of


@pytest.mark.parametrize(
    ("low", "high"), [(5.376, 5.397), (1.9, 2.4), (0.9, 9.3), (1e-4, 20.0), (8e-5, 3e4), (7.0, 7.0001)]
)
def test_logarithmic_axes_have_round_values(low, high):
    values = log_ticks(math.log10(low), math.log10(high))
    assert 3 <= len(values) <= 12 and all(low <= value <= high for value in values)
    names = names_of(values)
    assert len(set(names)) == len(names)
    for value, name in zip(values, names, strict=True):
        scale = 1000 if name.endswith("k") else 1
        assert float(name.removesuffix("k")) * scale == pytest.approx(value, rel=5e-3)
