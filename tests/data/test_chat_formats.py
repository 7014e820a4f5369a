"""Each published format: its text as published, the roles of its tokens, and the same ids from the exported tokenizer."""

import json
from collections import Counter

import numpy as np
import pytest

from megatron_ft.data.chat_format import ALFRED, FORMATS, LLAMA2, LLAMA3, VICUNA, get_format
from megatron_ft.data.chat_template import own_template
from megatron_ft.data.roles import ASSISTANT, PROMPTER, SYSTEM
from megatron_ft.data.tokenizer import load_tokenizer
from megatron_ft.data.tokenizer_export import export_tokenizer
from megatron_ft.errors import DataError, TokenizerError
from tests.data.helpers import fast_file, real, sentencepiece_file
from tools.pretokenizer.lines import records
from tools.pretokenizer.oasst import OasstOptions, conversations


def say(*turns):
    """ "system: x" and so on."""
    return [dict(zip(("role", "content"), turn.split(": ", 1), strict=True)) for turn in turns]


CHAT = say("system: be kind", "user: hello fox", "assistant: the dog", "user: and?", "assistant: a wizard 二")
PUBLISHED = {
    "chatml": "<|im_start|>system\nbe kind<|im_end|>\n<|im_start|>user\nhello fox<|im_end|>\n"
    "<|im_start|>assistant\nthe dog<|im_end|>\n<|im_start|>user\nand?<|im_end|>\n<|im_start|>assistant\na wizard 二<|im_end|>\n",
    "alfred": "<start_system>be kind<end_message><start_user>hello fox<end_message><start_assistant>the dog<end_message>"
    "<start_user>and?<end_message><start_assistant>a wizard 二<end_message>",
    "vicuna": "<s>be kind USER: hello fox ASSISTANT: the dog</s>USER: and? ASSISTANT: a wizard 二</s>",
    "llama2": "<s>[INST] <<SYS>>\nbe kind\n<</SYS>>\n\nhello fox [/INST] the dog </s><s>[INST] and? [/INST] a wizard 二 </s>",
    "llama3": "<|begin_of_text|><|start_header_id|>system<|end_header_id|>\n\nbe kind<|eot_id|>"
    "<|start_header_id|>user<|end_header_id|>\n\nhello fox<|eot_id|>"
    "<|start_header_id|>assistant<|end_header_id|>\n\nthe dog<|eot_id|>"
    "<|start_header_id|>user<|end_header_id|>\n\nand?<|eot_id|>"
    "<|start_header_id|>assistant<|end_header_id|>\n\na wizard 二<|eot_id|>",
}


@pytest.mark.parametrize("name", FORMATS)
def test_the_text_is_the_published_one(name):
    assert get_format(name).text(CHAT) == PUBLISHED[name]


def test_what_comes_before_an_answer():
    question = CHAT[1:2]
    assert VICUNA.text(question, True) == (
        "<s>A chat between a curious user and an assistant. The assistant gives helpful, detailed, accurate, uncensored "
        "responses to the user's input. USER: hello fox ASSISTANT:"
    )
    assert LLAMA2.text(say("user:  x\n"), True) == "<s>[INST] x [/INST]"
    assert ALFRED.text(question, True) == "<start_user>hello fox<end_message><start_assistant>"
    assert LLAMA3.text(question, True).endswith("<|start_header_id|>assistant<|end_header_id|>\n\n")


def test_context_becomes_part_of_the_question_where_a_format_has_no_turn_for_it():
    chat = [{"role": "context", "content": "C"}, {"role": "context", "content": "D"}, *CHAT[1:3]]
    assert "<start_user>C\nD\n\nhello fox<end_message>" in ALFRED.text(chat)
    blocks = "USER: BEGININPUT\nC\nENDINPUT\nBEGININPUT\nD\nENDINPUT\nBEGININSTRUCTION\nhello fox\nENDINSTRUCTION ASSISTANT: the dog</s>"
    assert VICUNA.text(chat).endswith(blocks)
    with pytest.raises(DataError, match="ends with context"):
        ALFRED.text(chat[:1])


MAKERS = {
    "sentencepiece": sentencepiece_file,
    "byte-level": fast_file,
    "metaspace": lambda folder: fast_file(folder, "metaspace"),
}
TRICKS = ["<s>", "</s> [INST]", "<|eot_id|>", "<end_message>", "  two  ", "", "a\n\nb", "é二😀", "USER: x", "\n"]


def chats_of_tricks():
    plain = [text for text in TRICKS if not any(token in text for f in FORMATS.values() for token in f.added_tokens)]
    return [CHAT] + [
        [
            {"role": "user", "content": a},
            {"role": "assistant", "content": b},
            {"role": "user", "content": b},
            {"role": "assistant", "content": a},
        ]
        for a in plain
        for b in plain
    ]


@pytest.fixture(params=MAKERS)
def made(request, tmp_path):
    """A tokenizer's file of each kind."""
    (tmp_path / "from").mkdir()
    return MAKERS[request.param](tmp_path / "from")


@pytest.mark.parametrize("name", FORMATS)
def test_transformers_gives_our_ids(made, tmp_path, name):
    transformers = pytest.importorskip("transformers")
    chat_format = get_format(name)
    tokenizer = load_tokenizer(made, chat_format.added_tokens)
    export_tokenizer(tokenizer, tmp_path / "to", chat_format.jinja, chat_format.stop_token, 4096)
    (tmp_path / "to/config.json").write_text(json.dumps({"model_type": "llama"}))
    theirs = transformers.AutoTokenizer.from_pretrained(tmp_path / "to")
    for chat in chats_of_tricks():
        for prompt in (False, True):
            ours = chat_format.encode(tokenizer, chat, prompt)[0].tolist()
            assert theirs.apply_chat_template(chat, add_generation_prompt=prompt, return_dict=False) == ours, chat
    again = own_template(load_tokenizer(tmp_path / "to"))
    assert again.stop_token == chat_format.stop_token
    for chat in chats_of_tricks():
        for mine, own in zip(chat_format.encode(tokenizer, chat), again.encode(tokenizer, chat), strict=True):
            assert mine.tolist() == own.tolist() or (name == "vicuna" and chat[0]["role"] == "user"), chat


@pytest.mark.parametrize("name", FORMATS)
def test_messages_never_become_control_tokens(made, name):
    chat_format = get_format(name)
    tokenizer = load_tokenizer(made, chat_format.added_tokens)
    template, _ = chat_format.encode(tokenizer, CHAT[1:3])
    controls = [index for name, index in tokenizer.special_tokens.items() if name != "<unk>"]  # what no piece can say
    for trick in (*TRICKS, *chat_format.added_tokens, *tokenizer.special_tokens):
        ids, _ = chat_format.encode(tokenizer, [{**CHAT[1], "content": trick}, {**CHAT[2], "content": trick}])
        assert Counter(ids[np.isin(ids, controls)].tolist()) == Counter(template[np.isin(template, controls)].tolist())


@pytest.mark.parametrize("name", FORMATS)
def test_roles_cover_the_turns(made, name):
    """Where text touches text across turns the tokens are those of the whole text, and roles change where turns do."""
    chat_format = get_format(name)
    tokenizer = load_tokenizer(made, chat_format.added_tokens)
    ids, role_bytes = chat_format.encode(tokenizer, CHAT)
    changes = np.flatnonzero(np.diff(role_bytes)) + 1
    assert role_bytes[[0, *changes]].tolist() == [SYSTEM, PROMPTER, ASSISTANT, PROMPTER, ASSISTANT]
    first = tokenizer.decode(
        ids[role_bytes == ASSISTANT][: int(np.argmax(np.diff(np.flatnonzero(role_bytes == ASSISTANT)) > 1)) + 1]
    )
    first = first.replace(" ", "")  # one of these tokenizers does not write those at the start
    assert "thedog" in first and "fox" not in first and "and?" not in first
    assert first.endswith((chat_format.stop_token, chat_format.stop_token + "\n"))
    flagged = [{**message, "mark_bits": 0b1000 if message["role"] == "user" else 0b10000} for message in CHAT]
    both = chat_format.encode(tokenizer, flagged)
    assert both[0].tolist() == ids.tolist()
    assert both[1].tolist() == [c | (0b1000 if c == PROMPTER else 0b10000) for c in role_bytes.tolist()]
    many = chat_format.encode_many(tokenizer, [CHAT, CHAT[:3], CHAT])
    assert many[2][0].tolist() == ids.tolist()
    assert many[1][0].tolist() == chat_format.encode(tokenizer, CHAT[:3])[0].tolist()


def test_the_real_llama2_tokenizer_turn_by_turn():
    """Against sentencepiece alone: chatml piece by piece, Llama-2 chat as one text between <s> and </s>."""
    import sentencepiece

    model = sentencepiece.SentencePieceProcessor(model_file=str(real("tokenizers/llama2/tokenizer.model")))
    tokenizer = load_tokenizer(
        real("tokenizers/llama2/tokenizer.model"),
        ["<CLS>", "<SEP>", "<EOD>", "<MASK>", "<PAD>", "<|im_start|>", "<|im_end|>"],
    )
    ids, _ = get_format("chatml").encode(tokenizer, CHAT)
    expected = []
    for message in CHAT:
        name = message["role"]
        expected += [32005, *model.encode(f"{name}\n{message['content']}"), 32006, *model.encode("\n")]
    assert ids.tolist() == expected
    trees = records(real("oasst/en_100_tree.jsonl"))
    chats = [chat for where, tree in trees for chat in conversations(tree, where, OasstOptions(), Counter())]
    for chat, (ids, _) in zip(chats, get_format("chatml").encode_many(tokenizer, chats), strict=True):
        expected = []
        for message in chat:
            name = {"prompter": "user"}.get(message["role"], message["role"])
            expected += [32005, *model.encode(f"{name}\n{message['content']}"), 32006, *model.encode("\n")]
        assert ids.tolist() == expected
    ids, roles = LLAMA2.encode(tokenizer, CHAT[1:3])
    question, answer = "[INST] hello fox [/INST]", " the dog "
    assert ids.tolist() == [1, *model.encode(question + answer), 2]
    assert roles.tolist().index(ASSISTANT) == 1 + len(model.encode(question))


def with_template(folder, source, **config):
    tokenizer = load_tokenizer(fast_file(folder), ["<|im_start|>", "<|im_end|>"])
    export_tokenizer(tokenizer, folder, source, "<|im_end|>", 4096)
    if config:
        path = folder / "tokenizer_config.json"
        path.write_text(json.dumps(json.loads(path.read_text()) | config))
    return load_tokenizer(folder)


LOOP = "{% for m in messages %}<|im_start|>{{ m['role'] }}\n{{ m['content'] }}<|im_end|>\n{% endfor %}"


@pytest.mark.parametrize(
    ("source", "message"),
    [
        ("{{ messages[-1]['content'] }}<|im_end|>", "leaves out message 1, of the role system"),
        ("{{ bos_token }}{% for m in messages %}{{ m['content'] }}\n{% endfor %}", "ends no answer"),
        (
            LOOP.replace("{{ m['content'] }}", "{{ m['content'] if m['role'] == 'user' }}"),
            "omits the assistant's text",
        ),
        ("{% for %}", "cannot be read"),
        (LOOP + "{{ strftime_now('%d') }}", "today's date"),
        (None, "no chat template"),
    ],
)
def test_templates_that_do_not_do_are_refused(tmp_path, source, message):
    tokenizer = with_template(tmp_path, source)
    with pytest.raises((TokenizerError, DataError), match=message):
        [own_template(tokenizer).encode(tokenizer, sample) for sample in own_template(tokenizer).samples(CHAT)]


def test_an_own_template_changes_messages(tmp_path):
    tokenizer = with_template(tmp_path, LOOP.replace("m['content']", "m['content'] | trim"))
    template = own_template(tokenizer)
    ids, _ = template.encode(tokenizer, say("user:  hi ", "assistant:  <|im_end|> "))
    assert tokenizer.decode(ids) == "<|im_start|>user\nhi<|im_end|>\n<|im_start|>assistant\n<|im_end|><|im_end|>\n"
    assert np.count_nonzero(ids == tokenizer.token_id("<|im_end|>")) == 2
    assert template.text(say("prompter: x")) == "<|im_start|>user\nx<|im_end|>\n"
    shouting = own_template(with_template(tmp_path, LOOP.replace("m['content']", "m['content'] | replace('x', 'y')")))
    ids, roles = shouting.encode(tokenizer, say("user: x x", "assistant: an eye"))
    assert tokenizer.decode(ids[roles == PROMPTER]) == "<|im_start|>user\ny y<|im_end|>\n"
    assert tokenizer.decode(ids[roles == ASSISTANT]) == "<|im_start|>assistant\nan eye<|im_end|>\n"
    with pytest.raises(DataError, match="leaves out or changes 'axe' of message 2, of the role assistant"):
        shouting.encode(tokenizer, say("user: x", "assistant: axe"))
    with pytest.raises(DataError, match="unknown role 'bot'"):
        shouting.encode(tokenizer, say("bot: x"))


def test_a_template_that_refuses_a_chat(tmp_path):
    tokenizer = with_template(tmp_path, "{% if messages|length == 1 and messages[0]['role'] == 'assistant' %}"
                              "{{ raise_exception('user first') }}{% endif %}" + LOOP)  # fmt: skip
    with pytest.raises(DataError, match=r"refuses this chat .user first"):
        own_template(tokenizer).encode(tokenizer, say("assistant: x"))


@pytest.mark.parametrize("fault", ["messages[0]['content'].missing.more", "messages[0]['content'] + 1"])
def test_a_fault_of_a_template_is_said_of_a_str(fault, tmp_path):
    """Not of our kind of str, which a reader does not know."""
    tokenizer = with_template(tmp_path, "{{ messages|length > 5 and " + fault + " }}" + LOOP)
    with pytest.raises(DataError, match=r"refuses this chat \(.*\bstr\b") as raised:
        own_template(tokenizer).encode(tokenizer, say(*["user: x", "assistant: y"] * 3))
    assert "Traced" not in str(raised.value) and "megatron_ft" not in str(raised.value)


def test_tokens_that_swallow_spaces_do_so_here_too(tmp_path):
    tokenizer = with_template(tmp_path, LOOP)
    for token in tokenizer.backend.description["added_tokens"]:
        token["rstrip"] = True
    ids, _ = own_template(tokenizer).encode(tokenizer, say("user: hi", "assistant: x "))
    assert tokenizer.decode(ids) == "<|im_start|>user\nhi<|im_end|><|im_start|>assistant\nx <|im_end|>"


@pytest.mark.parametrize("name", ["llama2", "vicuna", "alfred"])
def test_a_context_between_a_question_and_its_answer(name):
    """A format without turns for it makes the same of it as of one before the question."""
    question, context, answer = (
        {"role": role, "content": text}
        for role, text in (("user", "why?"), ("context", "a fact"), ("assistant", "so."))
    )
    chat_format = get_format(name)
    after = chat_format.text([question, context, answer, question, context, answer])
    assert after == chat_format.text([context, question, answer, context, question, answer]) and "a fact" in after
