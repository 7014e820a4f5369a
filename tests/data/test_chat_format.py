"""chatml: the text, the roles, control tokens by number, and the template made from the same object."""

import itertools

import jinja2
import numpy as np
import pytest

from megatron_ft.data.chat_format import CHATML, FORMATS, ChatFormat, get_format
from megatron_ft.data.roles import ASSISTANT, CONTEXT, PROMPTER, ROLES, SYSTEM, loss_weights
from megatron_ft.data.tokenizer import load_tokenizer
from megatron_ft.errors import ConfigError, DataError, TokenizerError
from tests.data.helpers import CHAT, CONTROLS, sentencepiece_file

# Turns that begin or end with a message, and have no control token before them.
BARE = ChatFormat(
    name="bare",
    added_tokens=("<end>",),
    stop_token="<end>",
    turns={PROMPTER: "{text}<end>", ASSISTANT: "Answer: {text}"},
    generation_prompt="Answer: ",
)


@pytest.fixture
def tokenizer(tmp_path):
    return load_tokenizer(sentencepiece_file(tmp_path), [*CONTROLS, "<end>"])


def test_chatml_is_the_published_text(tokenizer):
    chat = [{"role": "system", "content": "S"}, {"role": "context", "content": "C"}, *CHAT]
    assert CHATML.text(chat, add_generation_prompt=True) == (
        "<|im_start|>system\nS<|im_end|>\n<|im_start|>context\nC<|im_end|>\n"
        "<|im_start|>user\nWhat is 1 + 1?<|im_end|>\n<|im_start|>assistant\nIt's 2, naïvely: 二<|im_end|>\n"
        "<|im_start|>assistant\n"
    )
    ids, roles = CHATML.encode(tokenizer, chat, add_generation_prompt=True)
    assert tokenizer.decode(ids) == CHATML.text(chat, add_generation_prompt=True)
    assert (ids.dtype, roles.dtype) == (np.int32, np.uint8)


def test_a_turn_is_encoded_piece_by_piece_between_control_tokens(tokenizer):
    start, end = (tokenizer.token_id(token) for token in CONTROLS)
    ids, _ = CHATML.encode(tokenizer, CHAT[:1])
    text, newline = tokenizer.encode("user\nWhat is 1 + 1?"), tokenizer.encode("\n")
    assert ids.tolist() == [start, *text, end, *newline]


def test_the_whole_turn_carries_its_role(tokenizer):
    chat = [{"role": role, "content": "x"} for role in ("system", "user", "assistant", "context", "tool", "prompter")]
    _, roles = CHATML.encode(tokenizer, chat)
    per_turn = [len(CHATML.encode(tokenizer, [message])[0]) for message in chat]
    expected = np.repeat([SYSTEM, PROMPTER, ASSISTANT, CONTEXT, CONTEXT, PROMPTER], per_turn)
    assert roles.tolist() == expected.tolist()


def test_many_equal_one_by_one(tokenizer):
    chats = [CHAT, CHAT[:1], [], [{"role": "assistant", "content": ""}], CHAT * 3]
    for (ids, roles), chat in zip(CHATML.encode_many(tokenizer, chats), chats, strict=True):
        alone, alone_roles = CHATML.encode(tokenizer, chat)
        assert ids.tolist() == alone.tolist()
        assert roles.tolist() == alone_roles.tolist()
        assert (ids.dtype, roles.dtype) == (np.int32, np.uint8)


def test_a_message_that_is_a_control_token_stays_text(tokenizer):
    """Even where the format puts nothing around it."""
    ids, _ = BARE.encode(tokenizer, [{"role": "user", "content": "<end>"}])
    assert np.count_nonzero(ids == tokenizer.token_id("<end>")) == 1
    assert tokenizer.decode(ids) == "<end><end>"


@pytest.mark.parametrize("chat_format", [*FORMATS.values(), BARE], ids=lambda f: f.name)
def test_the_template_says_the_same(chat_format):
    roles = [name for name, number in ROLES.items() if number in chat_format.turns]
    chat = [{"role": role, "content": f"{role} 'says' \"{{{{x}}}}\"\n é "} for role in roles]
    environment = jinja2.Environment(trim_blocks=True, lstrip_blocks=True)  # as transformers sets it
    template = environment.from_string(chat_format.jinja)
    for prompt in (False, True):
        assert template.render(messages=chat, add_generation_prompt=prompt) == chat_format.text(chat, prompt)


def test_mistakes_are_named(tokenizer, tmp_path):
    with pytest.raises(DataError, match="unknown role 'bot'"):
        CHATML.encode(tokenizer, [{"role": "bot", "content": "x"}])
    with pytest.raises(DataError, match="unknown role 'system': chat format bare knows prompter, user, assistant"):
        BARE.encode(tokenizer, [{"role": "system", "content": "x"}])
    with pytest.raises(DataError, match="null, not text"):
        CHATML.encode(tokenizer, [{"role": "user", "content": None}])
    with pytest.raises(TokenizerError, match=r"<\|im_start\|>"):
        CHATML.encode(load_tokenizer(sentencepiece_file(tmp_path)), CHAT)
    with pytest.raises(ConfigError, match="chatml"):
        get_format("vicuna-9")


def test_loss_weights():
    assert loss_weights().tolist() == [0, 0, 1, 0]
    assert loss_weights(0.5, {"user": 0.25}).tolist() == [0.5, 0.25, 1, 0.5]
    for bad in ({"robot": 1.0}, {"user": -1.0}, {"user": float("nan")}):
        with pytest.raises(ConfigError):
            loss_weights(0.0, bad)


def test_weights_by_the_bits_of_a_role_byte():
    from megatron_ft.data.roles import MARKED, WEIGHT_SHIFT, byte_weights, weight_table

    table = weight_table([0.5, 0.0, 1.0])
    assert table == [1.0, 0.0, 0.5]
    weights = byte_weights(loss_weights(0.25), table, marked_loss_weight=0.75)
    assert weights[:4].tolist() == [0.25, 0.25, 1, 0.25]
    assert weights[MARKED | PROMPTER] == 0.75
    assert weights[MARKED | ASSISTANT] == 1  # a mark never lowers
    assert weights[2 << WEIGHT_SHIFT | ASSISTANT] == 0.5
    assert weights[1 << WEIGHT_SHIFT | MARKED | PROMPTER] == 0
    assert weights[3 << WEIGHT_SHIFT | ASSISTANT] == weights[5] == 0  # means nothing in these shards
    assert byte_weights(loss_weights(0.5), marked_loss_weight=0)[MARKED | PROMPTER] == 0.5
    with pytest.raises(DataError, match="17 different weights"):
        weight_table([i / 20 for i in range(1, 17)])
    with pytest.raises(DataError, match="weight -1"):
        weight_table([-1.0])


FOLDING = [name for name, chat_format in FORMATS.items() if chat_format.context is not None]


@pytest.mark.parametrize("empty", [None, "context"])
@pytest.mark.parametrize("name", FOLDING)
def test_the_template_folds_contexts_as_the_format_does(name, empty):
    """Every chat of one to four messages: the same text, and neither takes one that ends with a context."""
    chat_format = FORMATS[name]
    environment = jinja2.Environment()
    environment.globals["raise_exception"] = refuse
    rendered = environment.from_string(chat_format.jinja)
    for size in range(1, 5):
        for roles in itertools.product(("system", "user", "assistant", "context", "tool"), repeat=size):
            if "system" in roles[1:]:
                continue
            chat = [
                {"role": role, "content": "" if role == empty else f" {role} {i}\n"} for i, role in enumerate(roles)
            ]
            if roles[-1] in ("context", "tool"):
                with pytest.raises(DataError):
                    rendered.render(messages=chat)
                with pytest.raises(DataError, match="ends with context"):
                    chat_format.text(chat)
            else:
                said = rendered.render(messages=chat, add_generation_prompt=True)
                assert said == chat_format.text(chat, add_generation_prompt=True), roles


def refuse(message):
    raise DataError(message)


@pytest.mark.parametrize("name", FORMATS)
def test_templates_of_earlier_releases_are_recognised(name):
    from megatron_ft.data.chat_jinja import MARKS, template

    chat_format = FORMATS[name]
    earlier = [template(chat_format, marks, contexts=False) for marks in (("", ""), MARKS)]
    earlier.append(template(chat_format, reasoning=False, contexts=False))
    assert all(chat_format.is_said_by(source + "\n") for source in (*earlier, chat_format.exported))
    assert (chat_format.exported in earlier) == (chat_format.context is None)
