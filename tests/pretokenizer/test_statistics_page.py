"""The page of a split's statistics: counts of roles and lengths as numbers, and axes with names and values."""

import html
import itertools
import re
from types import SimpleNamespace

import numpy as np
import pytest

from megatron_ft.data.roles import ASSISTANT, PROMPTER
from tests.demo.test_report import Balanced
from tools.pretokenizer.statistics_page import page
from tools.pretokenizer.stats import Tally, count_roles

PACKED = [{"seq_length": 2048, "filled": 0.9931, "filled_unpacked": 0.08, "rows": 1562, "cut": 0.0}]


def tally(*lengths, name="chats"):
    """A dataset of samples of these lengths, of which the last token is the assistant's."""
    found = Tally(name, len(lengths))
    roles = np.concatenate([np.repeat([PROMPTER, ASSISTANT], [length - 1, 1]) for length in lengths])
    found.accept(np.array(lengths), count_roles(roles.astype(np.uint8), np.array(lengths)))
    return found


def shown(*tallies):
    text = page("x-train", SimpleNamespace(tallies=list(tallies), mixed=[]), PACKED, "")
    Balanced().feed(text)
    return text


def texts(svg):
    """(x, y, text) of every text of a figure."""
    found = re.findall(r'<text x="([\d.]+)" y="([\d.]+)"[^>]*>(.*?)</text>', svg)
    return [(float(x), float(y), html.unescape(text)) for x, y, text in found]


def test_roles_have_counts_and_shares():
    text = shown(tally(*[11] * 200))
    assert "chats: 200 samples, 2,200 tokens" in text
    assert "user 2,000 (90.9%)" in text and "assistant 200 (9.1%)" in text
    assert "<td>2,200</td>" in text and "<td>1,562</td>" in text


@pytest.mark.parametrize("lengths", [[45], [2, 2, 3], [*range(2, 400)], [2, 70_000], [9] * 5_000, [2, 3_000_000]])
def test_axes_have_names_values_and_room(lengths):
    figure = re.search(r"<svg.*?</svg>", shown(tally(*lengths)), re.DOTALL)[0]
    found = texts(figure)
    names = [text for _, _, text in found]
    assert {"tokens per sample, logarithmic", "samples", "0"} <= set(names)
    assert all(0 <= x <= 900 and 0 < y < 210 for x, y, _ in found)
    bottom = [(x, text) for x, y, text in found if y == 210 - 46 + 16]
    edges = [int(text.replace(",", "")) for _, text in bottom]
    assert edges == sorted(set(edges)) and edges[0] <= min(lengths) and len(edges) >= 2
    assert all(right[0] - left[0] > 7 * len(left[1]) for left, right in itertools.pairwise(bottom)), "they overlap"
    counts = re.findall(r"<title>[\d,]+ (?:tokens?|to [\d,]+ tokens): ([\d,]+) samples?</title>", figure)
    assert sum(int(count.replace(",", "")) for count in counts) == len(lengths)
    tops = [float(y) for y in re.findall(r'<rect x="[\d.]+" y="([\d.]+)"', figure)]
    assert min(tops) >= 20, "a bar is higher than the axis"


def test_one_of_a_thing_is_not_many():
    text = shown(tally(1))
    assert "chats: 1 sample, 1 token<" in text and "1 token: 1 sample<" in text
