"""The prompts: their length, where the answer is, the same from the same seed, and files of a user."""

import json
import random
import re
import uuid

import pytest

from megatron_ft.errors import DataError
from megatron_ft.evaluation.retrieval import corpus
from megatron_ft.evaluation.retrieval.cases import Grid, depths_of, make_cases, places
from megatron_ft.evaluation.retrieval.supply import Supply, place_first
from megatron_ft.evaluation.retrieval.tasks import Documents, KeyValues, Lines, Topics, ordinal

TASKS = (KeyValues(), Topics(), Lines(), Documents())
by_name = pytest.mark.parametrize("task", TASKS, ids=lambda task: task.name)


def words(text: str) -> int:
    return len(text.split())


def made(task, lengths=(400, 1200), samples=2, seed=5, count=words):
    grid = Grid((task,), lengths, depths_of(5), samples, seed)
    return list(make_cases(grid, places(grid), count, 20))


@by_name
def test_prompts_fill_their_length_and_hold_the_answer(task):
    """The answer stands where its depth says. Lines and pairs fill all but a few words; conversations are long."""
    room = 130 if task.name == "topics" else 60
    for case in made(task):
        assert case.length - 20 - room <= case.tokens <= case.length - 20 and case.tokens == words(case.text)
        places = [match.start() / len(case.text) for match in re.finditer(re.escape(case.expected[0]), case.text)]
        assert places and abs(places[0] - case.depth) < 0.45
    spread = [case.text.find(case.expected[0]) / len(case.text) for case in made(task, (1200,), 1)]
    assert spread == sorted(spread) and spread[0] < 0.3 and spread[-1] > 0.7


@by_name
def test_the_seed_decides(task):
    assert made(task) == made(task) != made(task, seed=6)
    assert len({case.text for case in made(task)}) == 20


@by_name
def test_a_longer_prompt_asks_the_same_with_more_around_it(task):
    cases = made(task)
    short, long = ([case for case in cases if case.length == length and case.depth == 0] for length in (400, 1200))
    assert [case.expected for case in short] == [case.expected for case in long]


@by_name
def test_a_length_without_room_is_refused(task):
    with pytest.raises(DataError, match=f"{task.name} at --lengths 30: two items have .* raise --lengths"):
        made(task, (30,))


def test_the_tasks_in_detail():
    (case, *_) = made(KeyValues())
    pairs = json.loads(re.search(r"\{.*\}", case.text, re.DOTALL)[0])
    key = re.search(r'\nKey: "(.*)"\nCorresponding value:$', case.text)[1]
    assert [pairs[key]] == list(case.expected) and len(pairs) > 10
    assert {uuid.UUID(text).version for text in (*pairs, *pairs.values())} == {4}
    (case, *_) = made(KeyValues(digits=2), (400,))
    assert re.fullmatch("[0-9a-f]{2}", case.expected[0])
    (case, *_) = made(Lines())
    name = re.search(r"REGISTER_CONTENT of line (.*)\? ", case.text)[1]
    assert f"line {name}: REGISTER_CONTENT is <{case.expected[0]}>\n" in case.text
    case = made(Topics(), (1200,))[4]
    topics = re.findall("discuss the topic of (.*)[.]\n", case.text)
    asked = re.search(r"What was the (\w+) topic\?", case.text)[1]
    assert [ordinal(n + 1) for n in range(len(topics))].index(asked) == topics.index(case.expected[0]) > 2
    (case, *_) = made(Documents())
    subject = re.search(r"Question: Who designed the (.*)\?\nAnswer:$", case.text)[1]
    assert f"(Title: {subject})" in case.text and case.text.count(case.expected[0]) == 1


def test_ordinals():
    assert [ordinal(n) for n in (1, 10, 11, 12, 13, 21, 22, 23, 24, 111, 121)] == (
        "first tenth 11th 12th 13th 21st 22nd 23rd 24th 111th 121st".split()
    )


def test_depths():
    assert depths_of(1) == (0.5,) and depths_of(5) == (0, 0.25, 0.5, 0.75, 1)
    assert [place_first(list("abcde"), depth) for depth in (0, 0.5, 1)] == [
        (list("abcde"), 0),
        (list("bcade"), 2),
        (list("bcdea"), 4),
    ]


def test_items_are_drawn_once_and_none_twice():
    draws = iter([1, 2, 1, 3, 3, 4])
    supply = Supply(draws, lambda item: item)
    assert supply.first(2) == [1, 2] and supply.first(3) == [1, 2, 3] and supply.first(9) == [1, 2, 3, 4]
    assert Supply(iter(lambda: 7, None), lambda item: item).first(5) == [7]  # one that only repeats itself ends


def write(path, lines):
    path.write_text("".join((line if isinstance(line, str) else json.dumps(line)) + "\n" for line in lines))
    return path


def test_topics_of_a_file(tmp_path):
    """In LongEval's own keys. A file that is too short for the length is an error, not a shorter prompt."""
    lines = [{"topic": f"topic {n}", "conversation": f"USER: topic {n}\nASSISTANT: {'word ' * 40}"} for n in range(40)]
    task = Topics(corpus.read_topics(write(tmp_path / "topics.jsonl", lines)))
    cases = made(task, (400,))
    assert all("USER: topic " in case.text and case.expected[0].startswith("topic ") for case in cases)
    with pytest.raises(DataError, match=r"all 40 items that there are have .* tokens together, 8980 are needed"):
        made(task, (9000,))


def test_documents_of_a_file(tmp_path):
    """Documents with their own questions, some without; what answers the question too is left out."""
    lines = [{"title": f"T{n}", "text": f"text {n} {'word ' * 20}"} for n in range(30)]
    lines[3] |= {"question": "What is three?", "answers": ["text 3"]}
    lines[4]["text"] = "this is text 3 too"
    task = Documents(corpus.read_documents(write(tmp_path / "documents.jsonl", lines)))
    for case in made(task, (400,)):
        assert case.expected == ("text 3",) and case.text.count("text 3") == 1
        assert "Question: What is three?\nAnswer:" in case.text


def test_questions_of_lost_in_the_middle(tmp_path):
    """Each question has its own documents, which are used before those of others."""
    lines = [
        {
            "question": f"question {q}",
            "answers": [f"answer <{q}>"],
            "ctxs": [
                {"title": f"Q{q} D{d}", "text": f"answer <{q}>" if d == 1 else "words " * 9, "isgold": d == 1}
                for d in range(8)
            ],
        }
        for q in range(20)
    ]
    task = Documents(corpus.read_documents(write(tmp_path / "qa.jsonl", lines)))
    asked = task.draw(random.Random(1))(8, 0.0)
    (q,) = re.search(r"question (\d+)", asked.text).groups()
    assert set(re.findall(r"Title: Q(\d+) ", asked.text)) == {q} and asked.expected == (f"answer <{q}>",)
    assert asked.text.index(f"Document [1](Title: Q{q} D1) answer") > 0


@pytest.mark.parametrize(
    "read, lines, words",
    [
        (corpus.read_topics, [], "is empty"),
        (corpus.read_topics, ["{"], "line 1: each line must be"),
        (corpus.read_topics, [{"topic": "a", "conversation": "b"}, {"topic": "a"}], "line 2: each line must be"),
        (corpus.read_topics, [{"topic": "a", "conversation": " "}], "line 1: "),
        (corpus.read_topics, ["[]"], "line 1: "),
        (corpus.read_documents, [{"title": "a", "text": "b"}], 'no document has a "question"'),
        (corpus.read_documents, [{"title": "a", "text": "b", "question": "c"}], "line 1: "),
        (corpus.read_documents, [{"title": "a", "text": "b", "question": "c", "answers": "d"}], "line 1: "),
        (
            corpus.read_documents,
            [{"question": "c", "answers": ["d"], "ctxs": [{"title": "a", "text": "b"}]}],
            "line 1: ",
        ),
        (corpus.read_documents, [{"question": "c", "answers": ["d"], "ctxs": 3}], "line 1: "),
    ],
)
def test_files_that_are_something_else(read, lines, words, tmp_path):
    with pytest.raises(DataError) as caught:
        read(write(tmp_path / "given.jsonl", lines))
    assert words in str(caught.value) and "given.jsonl" in str(caught.value) and "\n" not in str(caught.value)
