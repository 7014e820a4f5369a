"""Reasoning and tool calls as roles of their own: found, stored, and weighed when training starts."""

from itertools import groupby

import numpy as np
import pytest

from megatron_ft.config.sections import Data
from megatron_ft.data.chat_encoding import Part
from megatron_ft.data.chat_format import ALFRED, CHATML, LLAMA2, VICUNA, ChatFormat
from megatron_ft.data.loader import ChatDataset, Choices
from megatron_ft.data.roles import (
    ASSISTANT,
    EMPTY_REASONING,
    PROMPTER,
    REASONING,
    SPOKEN,
    TOOL_CALL,
    all_weights,
    are_spoken,
    last_turn,
    loss_weights,
)
from megatron_ft.data.shards import ShardWriter, open_shards
from megatron_ft.data.tokenizer import load_tokenizer
from megatron_ft.data.trained_on import weights_of
from megatron_ft.errors import ConfigError
from tests.data.helpers import fast_file, sentencepiece_file

CALL = {"type": "function", "function": {"name": "add", "arguments": {"a": 1}}}
CHAT = [
    {"role": "user", "content": "hello <think>x</think>"},
    {"role": "assistant", "content": "<think>\nthe fox\n</think>\n\nthe dog"},
    {"role": "user", "content": "and?"},
    {"role": "assistant", "content": "<think>\n\n</think>\n\nlet me see", "tool_calls": [CALL, CALL]},
    {"role": "tool", "content": "2"},
    {"role": "assistant", "content": "two"},
]
CALLED = '<tool_call>\n{"name": "add", "arguments": {"a": 1}}\n</tool_call>'


def stretches(tokenizer, ids, codes):
    for role, group in groupby(zip(codes.tolist(), ids.tolist(), strict=True), key=lambda one: one[0]):
        yield role, tokenizer.decode([index for _, index in group])


def test_the_parts_of_an_answer(tmp_path):
    tokenizer = load_tokenizer(fast_file(tmp_path), CHATML.added_tokens)
    said = list(stretches(tokenizer, *CHATML.encode(tokenizer, CHAT)))
    assert said[0][0] == PROMPTER and "<think>x</think>" in said[0][1]
    assert said[1:4] == [
        (ASSISTANT, "<|im_start|>assistant\n"), (REASONING, "<think>\nthe fox\n</think>\n\n"), (ASSISTANT, "the dog<|im_end|>\n")
    ]  # fmt: skip
    assert said[5:10] == [
        (ASSISTANT, "<|im_start|>assistant\n"), (EMPTY_REASONING, "<think>\n\n</think>\n\n"), (ASSISTANT, "let me see\n"),
        (TOOL_CALL, f"{CALLED}\n{CALLED}"), (ASSISTANT, "<|im_end|>\n"),
    ]  # fmt: skip


@pytest.mark.parametrize("make", [sentencepiece_file, fast_file])
@pytest.mark.parametrize("chat_format", [CHATML, ALFRED, VICUNA, LLAMA2], ids=lambda one: one.name)
def test_parts_change_no_id(tmp_path, make, chat_format, monkeypatch):
    """The tokens are those of the whole text."""
    tokenizer = load_tokenizer(make(tmp_path), chat_format.added_tokens)
    ids, codes = chat_format.encode(tokenizer, CHAT)
    monkeypatch.setattr(ChatFormat, "_content_parts", lambda self, code, message, content: [Part(code, content)])
    whole, speakers = chat_format.encode(tokenizer, CHAT)
    assert ids.tolist() == whole.tolist()
    assert are_spoken(codes).tolist() == (speakers == ASSISTANT).tolist()
    assert set(SPOKEN) <= set(codes.tolist()) and REASONING not in speakers


def test_reasoning_beside_the_text_is_said_before_it(tmp_path):
    keyed = [CHAT[0], {"role": "assistant", "content": "the dog", "reasoning_content": "the fox"}]
    assert CHATML.text(keyed) == CHATML.text(CHAT[:2])
    assert CHATML.text([keyed[0], {"role": "assistant", "content": "the dog", "thinking": "the fox"}]) == CHATML.text(
        keyed
    )
    assert LLAMA2.text([keyed[0], keyed[1] | {"content": "  the dog "}]) == LLAMA2.text(CHAT[:2])


def test_transformers_says_reasoning_as_we_do(tmp_path):
    transformers = pytest.importorskip("transformers")
    from megatron_ft.data.chat_format import FORMATS
    from megatron_ft.data.tokenizer_export import export_tokenizer

    answers = [
        {"content": " the dog "},
        {"content": ""},
        {"content": " ", "tool_calls": [CALL]},
        {"content": "the dog", "tool_calls": [CALL]},
    ]
    chats = [
        [{"role": "user", "content": "hello"}, {"role": "assistant", "reasoning_content": "the fox\n", **answer}]
        for answer in answers
    ]
    for name, chat_format in FORMATS.items():
        folder = tmp_path / name
        folder.mkdir()
        tokenizer = load_tokenizer(fast_file(folder), chat_format.added_tokens)
        export_tokenizer(tokenizer, folder / "to", chat_format.exported, chat_format.stop_token)
        (folder / "to/config.json").write_text('{"model_type": "llama"}')
        theirs = transformers.AutoTokenizer.from_pretrained(folder / "to")
        for keyed in chats:
            found = theirs.apply_chat_template(keyed, return_dict=True, return_assistant_tokens_mask=True)
            ids, codes = chat_format.encode(tokenizer, keyed)
            assert found["input_ids"] == ids.tolist(), name
            assert chat_format.text(keyed).count("<think>") == 1 and REASONING in codes
            if name in ("chatml", "alfred", "llama3"):  # elsewhere tokens reach over turns
                assert found["assistant_masks"] == are_spoken(codes).astype(int).tolist(), name


def test_weights_of_parts():
    assert weights_of(Data()).tolist() == [0, 0, 1, 0, 1, 1, 1]
    chosen = Data(train_on_reasoning=False, train_on_empty_reasoning=False, scalar_loss_mask=0.5)
    assert weights_of(chosen).tolist() == [0.5, 0.5, 1, 0.5, 0, 1, 0]
    named = Data(train_on_tool_calls=False, role_loss_weights=["assistant=0.5", "reasoning=0.25"])
    assert weights_of(named).tolist() == [0, 0, 0.5, 0, 0.25, 0, 0.5]
    with pytest.raises(ConfigError, match="not negative"):
        all_weights(0, {"reasoning": -1})
    with pytest.raises(ConfigError, match=r"unknown role 'thought': the roles are .*reasoning"):
        all_weights(0, {"thought": 1})


def write(prefix, chats):
    with ShardWriter(prefix, 100, parts=True) as writer:
        for codes in chats:
            writer.add(np.arange(len(codes)), np.array(codes, np.uint8))
    return open_shards(prefix)


def test_shards_with_parts_have_a_version_of_their_own(tmp_path):
    old = write(tmp_path / "old", [[0, 1, 2, 2]])
    assert (old.manifest.format_version, old.manifest.roles) == (1, ["system", "prompter", "assistant", "context"])
    assert set(old.manifest.counts["tokens_by_role"]) == set(old.manifest.roles)
    new = write(tmp_path / "new", [[1, 2, 4, 4, 5, 2]])
    assert new.manifest.format_version == 3
    assert new.manifest.counts["tokens_by_role"] == {
        "system": 0, "prompter": 1, "assistant": 2, "context": 0, "reasoning": 2, "tool_call": 1
    }  # fmt: skip
    assert new.loss_weights(weights_of(Data(train_on_reasoning=False)))[new.role_bytes(0)].tolist() == [
        0,
        1,
        0,
        0,
        1,
        1,
    ]
    assert old.loss_weights(weights_of(Data()))[:4].tolist() == old.loss_weights(loss_weights())[:4].tolist()


def test_the_last_turn_only(tmp_path):
    shards = write(tmp_path / "x", [[1, 2, 2, 3, 4, 2], [1, 1, 1], [2, 1, 2, 1]])
    rows = {}
    for only in (False, True):
        choices = Choices(6, packed=False, shuffle=False, last_turn_only=only)
        data = ChatDataset([shards], weights_of(Data()), choices)
        rows[only] = data.microbatch([0, 1, 2]).weights.tolist()
    assert rows[False] == [[1, 1, 0, 1, 1, 0], [0] * 6, [0, 1, 0, 0, 0, 0]]
    assert rows[True] == [[0, 0, 0, 1, 1, 0], [0] * 6, [0, 1, 0, 0, 0, 0]]
    assert [last_turn(shards.role_bytes(i)) for i in range(3)] == [4, 3, 2]
