"""Scorers against answers written by hand, as the tasks' authors would score them."""

import pytest

from megatron_ft.evaluation.retrieval.scorers import best_subspan, holds_value, last_number, normalised

UUID = "0d7ba717-e034-410e-88ab-c13d37cc6499"


@pytest.mark.parametrize(
    "answer, score",
    [
        (UUID, 1),
        (f'"{UUID}"', 1),
        (UUID.upper(), 1),
        (f"Sure!\n\nThe value is {UUID}.", 1),  # later lines count here
        (UUID[:-1], 0),
        (UUID.replace("-", ""), 0),
        ("0d7ba717", 0),
        ("", 0),
    ],
)
def test_key_value(answer, score):
    assert holds_value(answer, [UUID]) == score


@pytest.mark.parametrize(
    "answer, score",
    [
        ("3f", 1),
        ('": "3F"', 1),
        ("key:3f,", 1),
        ("It is 3f.", 1),
        ("a3f", 0),
        ("3f0", 0),
        ("0d7b3f17", 0),
        ("é3f", 0),
        ("3 f", 0),
    ],
)
def test_short_values_stand_alone(answer, score):
    assert holds_value(answer, ["3f"]) == score


@pytest.mark.parametrize(
    "answer, score",
    [
        ("24498", 1),
        ("The <REGISTER_CONTENT> in line torpid-kid is <24498>.", 1),
        ("line 17: REGISTER_CONTENT is 24498", 1),  # the last number counts
        ("24498, from line 17", 0),
        ("024498", 1),  # as a number
        ("2449", 0),
        ("24498.5", 0),
        ("I do not know", 0),
        ("", 0),
    ],
)
def test_lines(answer, score):
    assert last_number(answer, ["24498"]) == score


@pytest.mark.parametrize(
    "answer, score",
    [
        ("Wilhelm Conrad Röntgen", 1),
        ("It was wilhelm conrad röntgen, in 1901.", 1),
        ("\n  The winner: Wilhelm  Conrad, Röntgen!", 1),
        ("W. C. Röntgen", 1),  # the second of the right answers
        ("Let me see.\nWilhelm Conrad Röntgen", 0),  # only the first line counts
        ("Wilhelm Röntgen", 0),
        ("", 0),
    ],
)
def test_documents(answer, score):
    assert best_subspan(answer, ["Wilhelm Conrad Röntgen", "W.C. Röntgen", "W. C. Röntgen"]) == score


@pytest.mark.parametrize(
    "answer, score",
    [
        ("The benefits of volunteering", 1),
        ("Benefits of Volunteering.", 1),
        ("The first topic was 'the benefits of the volunteering'", 1),
        ("volunteering", 0),
    ],
)
def test_topics(answer, score):
    assert best_subspan(answer, ["The benefits of volunteering"]) == score


def test_nothing_but_punctuation_and_articles_is_never_found():
    assert best_subspan("anything", ["The", "?!"]) == 0


def test_normalised():
    assert normalised(" The  Quick, brown fox's\tA-Team ") == "quick brown foxs ateam"
