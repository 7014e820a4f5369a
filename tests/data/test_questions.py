"""Chats cut before their last answer: what inference would be asked, in every chat format, and a choice that stays the same."""

import numpy as np
import pytest

from megatron_ft.data.chat_format import FORMATS, get_format
from megatron_ft.data.chat_template import TemplateOptions, own_template
from megatron_ft.data.questions import LONGEST, choose, cut, frames_of, opening_of
from megatron_ft.data.roles import ASSISTANT, PROMPTER
from megatron_ft.data.shards import ShardWriter, open_shards
from megatron_ft.data.tokenizer import load_tokenizer
from megatron_ft.generation.loading import stop_ids_of
from tests.data.families import DATE, FAMILIES, write
from tests.data.helpers import fast_file, sentencepiece_file

EMOJI = "\N{GRINNING FACE}"
CHAT = [
    {"role": "user", "content": "the quick fox ?"},
    {"role": "assistant", "content": "fox jumps."},
    {"role": "user", "content": f"over\na dog {EMOJI}"},
    {"role": "assistant", "content": "yes, a lazy one"},
]
SYSTEM = {"role": "system", "content": "be quick"}
NONE = np.zeros(0, np.int32)


def question(chat, tokenizer, messages):
    ids, role_bytes = chat.encode(tokenizer, messages)
    return cut(ids, role_bytes, opening_of(chat, tokenizer), sorted(stop_ids_of(tokenizer, chat)))


@pytest.mark.parametrize("make", [sentencepiece_file, fast_file])
@pytest.mark.parametrize("name", FORMATS)
def test_every_format_asks_what_inference_asks(name, make, tmp_path):
    tokenizer = load_tokenizer(make(tmp_path), FORMATS[name].added_tokens)
    chat, messages = get_format(name, tokenizer), [SYSTEM, *CHAT]
    found = question(chat, tokenizer, messages)
    expected = chat.encode(tokenizer, messages[:-1], add_generation_prompt=True)[0]
    assert np.array_equal(found.prompt, expected)
    assert tokenizer.decode(found.answer, True).strip() == "yes, a lazy one"
    assert found.messages(tokenizer, frames_of(chat, tokenizer)) == messages[:-1]


@pytest.mark.parametrize("name", FAMILIES)
def test_so_does_every_template(name, tmp_path):
    tokenizer = load_tokenizer(write(name, tmp_path))
    chat = own_template(tokenizer, TemplateOptions(DATE))
    found = question(chat, tokenizer, CHAT[:2])
    expected = chat.encode(tokenizer, CHAT[:1], add_generation_prompt=True)[0]
    assert np.array_equal(found.prompt, expected) and "fox jumps." in tokenizer.decode(found.answer, True)
    assert found.messages(tokenizer, frames_of(chat, tokenizer))[-1] == CHAT[0]


def test_plain_text_has_no_question():
    assert len(opening_of(None, None)) == 0 and frames_of(None, None) == {}
    ids = np.arange(9, dtype=np.int32)
    assert cut(ids, np.full(9, PROMPTER, np.uint8), NONE, []) is None
    assert cut(ids, np.full(9, ASSISTANT, np.uint8), NONE, []) is None
    assert cut(ids, np.repeat([PROMPTER, ASSISTANT], [8, 1]).astype(np.uint8), NONE, [8]) is None, "an empty answer"


def test_another_beginning_of_an_answer_is_no_question():
    ids, role_bytes = np.arange(9, dtype=np.int32), np.repeat([PROMPTER, ASSISTANT], [5, 4]).astype(np.uint8)
    assert cut(ids, role_bytes, np.array([90, 91]), []) is None
    assert cut(ids, role_bytes, np.array([5, 91]), [8]).answer.tolist() == [6, 7], (
        "a token joined with the answer's first"
    )
    assert cut(ids, role_bytes, np.array([3, 4]), [8]).answer.tolist() == [5, 6, 7], (
        "an opening that belongs to the question"
    )


@pytest.fixture
def shards(tmp_path):
    """40 chats whose first id tells them apart, every fourth too long, and 10 texts without an answer."""
    for name, count, answers in (("a", 40, 4), ("b", 10, 0)):
        with ShardWriter(tmp_path / name, 100_000) as writer:
            for number in range(count):
                asked = LONGEST + 1 if number % 4 == 3 else 5
                ids = np.full(asked + answers, 7, np.int32)
                ids[0] = 1000 + number
                writer.add(ids, np.repeat([PROMPTER, ASSISTANT], [asked, answers]).astype(np.uint8))
    return [open_shards(tmp_path / name) for name in ("b", "a")]


def test_the_choice_is_spread_and_stays_the_same(shards):
    found = [int(one.prompt[0]) - 1000 for one in choose(shards, 8, 1000, NONE, [])]
    assert found == [int(one.prompt[0]) - 1000 for one in choose(shards, 8, 1000, NONE, [])]
    assert len(set(found)) == 8 and min(found) < 10 and max(found) >= 30 and all(number % 4 < 3 for number in found)
    assert [int(one.prompt[0]) - 1000 for one in choose(shards, 3, 1000, NONE, [])] == found[:3]


def test_fewer_than_asked_for(shards, tmp_path):
    assert len(choose(shards, 100, 1000, NONE, [])) == 30
    assert choose(shards, 4, 9, NONE, []) == [], "an answer would have no room"
    assert choose([], 4, 1000, NONE, []) == choose(shards[:1], 4, 1000, NONE, []) == []
