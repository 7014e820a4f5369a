"""Conversations: taking back, saving as the pretokenizer reads it, and what a model does not read of a long one."""

import json
from collections import Counter

import pytest

from megatron_ft.chat.conversation import Conversation, fitted
from megatron_ft.errors import ConfigError
from tools.pretokenizer.readers import recognise


def talked(*texts: str, system=None) -> Conversation:
    chat = Conversation(system)
    for text in texts:
        chat.ask(text)
        chat.answer(0, text.upper())
    return chat


def words(messages):
    """A tokenizer with a token a word."""
    return " ".join(message["content"] for message in messages).split()


def test_taking_back():
    chat = talked("a", "b")
    assert chat.take_back() == "b" and chat.messages(0) == talked("a").messages(0)
    assert (chat.take_back(), chat.take_back()) == ("a", None)


def test_two_models_have_answers_of_their_own():
    chat = Conversation("Be brief.", 2)
    chat.ask("a")
    chat.answer(0, "one")
    chat.answer(1, "two")
    assert [m["content"] for m in chat.messages(1)] == ["Be brief.", "a", "two"]
    lines = [json.loads(line) for line in chat.saved(["A", "B"]).splitlines()]
    assert [(line["model"], line["messages"][-1]["content"]) for line in lines] == [("A", "one"), ("B", "two")]


def test_the_pretokenizer_recognises_a_saved_chat(tmp_path):
    path = tmp_path / "chat.jsonl"
    path.write_text(talked("é\n\u2028", system="s").saved(["m"]), encoding="utf-8")
    reader, chat = recognise(path), talked("é\n\u2028", system="s")
    (read,) = reader.convert(json.loads(path.read_text(encoding="utf-8")), "line 1", reader.options(), Counter())
    assert [dict(message) for message in read] == chat.messages(0)


def test_the_beginning_of_a_long_conversation_is_left_out():
    chat = talked("a b", "c d", "e f", system="s")
    chat.ask("g")
    messages = chat.messages(0)
    assert fitted(messages, words, 100, 10) == (words(messages), 0)
    assert fitted(messages, words, 14, 3) == (["s", "c", "d", "C", "D", "e", "f", "E", "F", "g"], 2)
    assert fitted(messages, words, 8, 100) == (["s", "g"], 6)  # room for an answer is at most half
    assert fitted(messages, words, 3, 1) == (["s", "g"], 6)
    with pytest.raises(ConfigError, match="has 2 tokens, the model accepts up to 1: shorten it"):
        fitted(messages, words, 2, 1)


def test_room_is_not_kept_for_the_last_question():
    chat = talked("a")
    chat.ask("b c d e")
    assert fitted(chat.messages(0), words, 5, 4) == (["b", "c", "d", "e"], 2)
