"""Counts and sizes in words."""

import ast
import re
from pathlib import Path

import pytest

from megatron_ft.wording import counted, every, human, part_of, size


def test_no_message_leaves_the_plural_open():
    """Not "1 file(s)": counted() knows."""
    root = Path(__file__).parent.parent
    for path in [
        path for folder in ("megatron_ft", "tools", "checkpoints_conversion") for path in (root / folder).rglob("*.py")
    ]:
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(node, ast.Constant) and isinstance(node.value, str):
                assert not re.search(r"[a-z]\((s|es)\)", node.value), (path, node.lineno, node.value)


@pytest.mark.parametrize(
    ("count", "noun", "text"),
    [
        (0, "row", "0 rows"), (1, "row", "1 row"), (2, "row", "2 rows"), (1000, "global batch", "1,000 global batches"),
        (2, "process", "2 processes"), (3, "entry", "3 entries"),
        (2, "key", "2 keys"), (2, "prefix", "2 prefixes"), (-1, "step", "-1 steps"),
    ],
)  # fmt: skip
def test_a_count_agrees_with_its_noun(count, noun, text):
    assert counted(count, noun) == text


def test_intervals_and_large_numbers():
    assert [every(n, "step") for n in (1, 10)] == ["every step", "every 10 steps"]
    assert [human(n) for n in (999, 3_400_000, 70_000_000_000)] == ["999", "3.4 M", "70.0 B"]


@pytest.mark.parametrize(
    ("count", "text"),
    [(0, "0 bytes"), (1, "1 byte"), (999, "999 bytes"), (176_000, "176.0 kB"), (13.5e9, "13.5 GB"), (2e12, "2.0 TB"), (4e15, "4,000.0 TB")],
)  # fmt: skip
def test_a_size_has_a_unit_that_fits(count, text):
    assert size(count) == text


@pytest.mark.parametrize(
    ("done", "total", "text"),
    [
        (0, 0, "0 of 0 bytes"), (0, 12, "0 of 12 bytes"), (88_000, 176_000, "88.0 of 176.0 kB"), (3.2e9, 13.5e9, "3.2 of 13.5 GB"),
        (1000, 2e9, "0.0 of 2.0 GB"),
    ],
)  # fmt: skip
def test_a_part_is_in_the_unit_of_the_whole(done, total, text):
    assert part_of(done, total) == text
