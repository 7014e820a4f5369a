"""docs/works_with.md is what the marks of the tests say, and what a mark says can be so."""

import ast
import functools

import pytest

from tests.docs.works_with import FEATURES, PAGE, Mark, marks, page
from tests.test_layers import MODULES, tree

FOUND = marks()


def test_the_page_is_fresh():
    assert PAGE.read_text(encoding="utf-8") == page(FOUND), "run `make docs`"


@pytest.mark.parametrize("mark", FOUND, ids=lambda mark: mark.test.split("::")[1])
def test_a_mark_can_be_read(mark):
    names = [name for group in mark.features for name in group]
    assert len(mark.features) >= 2 and not set(names) - set(FEATURES), names
    assert mark.test.split("::")[1].startswith("test_")
    assert bool(mark.says) != mark.works


@functools.cache
def texts() -> str:
    """All text that the package can print, what is filled in left out."""
    found = []
    for path in MODULES.values():
        for node in ast.walk(tree(path)):
            if isinstance(node, ast.JoinedStr):
                parts = [part.value if isinstance(part, ast.Constant) else "…" for part in node.values]
                found.append("".join(map(str, parts)))
            elif isinstance(node, ast.Constant) and isinstance(node.value, str):
                found.append(node.value)
    return "\n".join(found)


@pytest.mark.parametrize("mark", [mark for mark in FOUND if not mark.works], ids=lambda mark: mark.says[:40])
def test_a_refusal_is_one_of_ours(mark):
    assert mark.says in texts()


def test_nothing_is_both_tried_and_unknown():
    """Each feature is in a test: a name that no test bears would be an empty row for ever."""
    borne = {name for mark in FOUND for names in mark.combinations() for name in names}
    assert set(FEATURES) == borne


def test_a_page_of_few_marks():
    """Alternatives are not tried together; what contains another is tried with it; an answer leads to its test."""
    few = [
        Mark("tests/a.py::test_one", True, (("LoRA",), ("SP", "PP"))),
        Mark("tests/a.py::test_two", False, (("SP",), ("PP",)), "together they cannot"),
        Mark("tests/b.py::test_three", False, (("LoRA",), ("PP",)), "nor these in one way"),
    ]
    rows = {line.split("|")[1].strip(): line for line in page(few).splitlines() if line.startswith("| ")}
    cells = [cell.strip() for cell in rows["LoRA"].split("|")[2:-1]]
    assert cells[:4] == ["[yes](#t1)", "[yes](#t1)", "[yes](#t1)", ""], "TP, SP, PP, VPP"
    assert "[no](#t2)" in rows["PP"] and "[yes]" not in rows["PP"]
    assert "SP + PP refused: `… together they cannot …`" in page(few)
