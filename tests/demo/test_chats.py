"""The demo's chats: what is held out is held out, and can be learned from the rest."""

import re
from collections import defaultdict

import pytest

from megatron_ft.demo.chats import ChatSet, Question, as_prompts, check_held_out, make_chats
from megatron_ft.demo.facts import TOPICS


@pytest.fixture(scope="module")
def made() -> ChatSet:
    return make_chats(seed=3)


def words(text: str) -> str:
    return re.sub(r"[^a-z ]", "", text.lower())


def asked(made: ChatSet) -> dict[str, str]:
    """Every question of the training chats -> its answer; fails where one question has two answers."""
    found: dict[str, str] = {}
    for chat in made.chats:
        turns = [turn for turn in chat["messages"] if turn["role"] != "system"]
        for user, assistant in zip(turns[::2], turns[1::2], strict=True):
            assert (user["role"], assistant["role"]) == ("user", "assistant")
            assert found.setdefault(user["content"], assistant["content"]) == assistant["content"]
    return found


def test_enough_questions_and_none_of_them_in_a_training_chat(made):
    text = [words(turn["content"]) for chat in made.chats for turn in chat["messages"]]
    held_out = {words(question.text) for question in made.held_out}
    assert len(held_out) == len(made.held_out) >= 200
    assert not held_out & set(text)


def test_each_fact_is_trained_in_other_wordings_and_each_wording_with_other_subjects(made):
    trained = asked(made)
    by_answer = defaultdict(set)
    for question, answer in trained.items():
        by_answer[answer].add(question)
    for question in made.held_out:
        assert len(by_answer[question.answer]) >= 6, question
    for topic in TOPICS:
        for wording in topic.wordings:
            pattern = re.compile(".+".join(map(re.escape, wording.split("{x}"))))
            assert sum(bool(pattern.fullmatch(question)) for question in trained) >= 8, wording


def test_a_wording_never_begins_with_its_subject():
    assert not [w for topic in TOPICS for w in topic.wordings if w.lower().startswith("{x}") or "{x}" not in w]


def test_a_leaked_question_is_found_whatever_its_punctuation(made):
    leaked = {"messages": [{"role": "user", "content": made.held_out[7].text.upper().rstrip("?.") + " !"}]}
    with pytest.raises(AssertionError, match="held-out"):
        check_held_out(ChatSet([*made.chats, leaked], made.held_out, made.facts))


def test_same_seed_same_chats():
    assert make_chats(1, 50) == make_chats(1, 50)
    assert make_chats(1, 50).chats != make_chats(2, 50).chats


def test_prompts_carry_what_is_expected():
    assert as_prompts([Question("colour", "What colour is a plum?", "A plum is purple.")]) == [
        {
            "messages": [{"role": "user", "content": "What colour is a plum?"}],
            "expected": "A plum is purple.",
            "topic": "colour",
        }
    ]
