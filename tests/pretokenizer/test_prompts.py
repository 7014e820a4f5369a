"""pretokenize --write_prompts: the prompts are those of the validation chats, and of no training chat."""

import json
from pathlib import Path

import pytest

from megatron_ft.generation.prompts import read_references
from tests.pretokenizer.fixtures import lines
from tests.pretokenizer.test_finished import DONE, contents
from tests.pretokenizer.test_pretokenize import place, shortcut  # noqa: F401 - a fixture
from tools.pretokenizer.prompts import as_prompt

PROMPTS = "out/mine-val-prompts.jsonl"


def texts(split: str) -> list[str]:
    return [json.loads(line)["text"] for line in Path(f"out/mine-{split}.jsonl").read_text().splitlines()]


@pytest.mark.parametrize("more", [(), ("--duplicates", "exact"), ("--workers", 2)])
def test_they_are_the_held_out_chats(place, more):  # noqa: F811
    """The text of the shards, which another part of the program writes, says which chats are in which split."""
    chats = [
        [{"role": "system", "content": f"be {i}"}, {"role": "user", "content": f"ask {i}"},
         {"role": "assistant", "content": f"say {i} now"}, {"role": "user", "content": "more"},
         {"role": "assistant", "content": "no"}]
        for i in range(3000)
    ]  # fmt: skip
    (place / "many.jsonl").write_bytes(lines([{"messages": chat} for chat in chats]))
    flags = ("--write_json", "--write_prompts", 1000, "--val_split", 0.3, *more)
    assert shortcut(*flags, source="many.jsonl") == 0
    found = read_references(Path(PROMPTS))
    assert len(found) == len(texts("val")) == 900
    for prompt, text in zip(found, texts("val"), strict=True):
        system, user = (message["content"] for message in prompt["messages"])
        assert all(f"\n{said}<|im_end|>" in text for said in (system, user, prompt["answer"]))
    trained = "".join(texts("train"))
    assert not any(f"\n{prompt['answer']}<|im_end|>" in trained for prompt in found)


def test_at_most_so_many_and_again_nothing_to_do(place, capsys):  # noqa: F811
    assert shortcut("--write_prompts", 2, "--val_split", 0.5) == 0
    before = contents(place / "out")
    assert len(Path(PROMPTS).read_text().splitlines()) == 2
    capsys.readouterr()
    assert shortcut("--write_prompts", 2, "--val_split", 0.5) == 0 and capsys.readouterr().out == DONE
    assert contents(place / "out") == before
    Path(PROMPTS).unlink()
    assert shortcut("--write_prompts", 2, "--val_split", 0.5) == 2
    assert "mine-val-prompts.jsonl no longer exists" in capsys.readouterr().err
    assert shortcut("--val_split", 0, "--overwrite", "--write_prompts", 2) == 0 and not Path(PROMPTS).exists()


def test_a_negative_number_is_refused(place, capsys):  # noqa: F811
    assert shortcut("--write_prompts", -1) == 2
    assert "write_prompts is -1; give a number that is not negative" in capsys.readouterr().err


USER, ANSWER = {"role": "prompter", "content": "hi"}, {"role": "assistant", "content": "ho"}


@pytest.mark.parametrize(
    "chat",
    [
        [ANSWER],
        [ANSWER, USER, ANSWER],
        [USER],
        [USER, {**ANSWER, "content": ""}],
        [USER, {**ANSWER, "tool_calls": []}],
        [{"role": "system", "content": "be"}, ANSWER],
    ],
)
def test_chats_without_a_question_and_an_answer_give_none(chat):
    assert as_prompt(chat) is None


def test_the_first_answer_and_what_precedes_it():
    context = {"role": "context", "content": "page 1"}
    assert as_prompt([USER, context, ANSWER, USER, ANSWER]) == {
        "messages": [{"role": "user", "content": "hi"}, context], "answer": "ho",
    }  # fmt: skip
