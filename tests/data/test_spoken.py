"""Roles of reasoning and calls that contain the marks by which these are known: what the record says decides."""

import itertools
import json

import pytest

from megatron_ft.data.chat_format import FORMATS, get_format
from megatron_ft.data.chat_template import TemplateOptions, own_template
from megatron_ft.data.roles import ASSISTANT, EMPTY_REASONING, REASONING, TOOL_CALL
from megatron_ft.data.spoken import segments
from megatron_ft.data.tokenizer import load_tokenizer
from megatron_ft.data.tokenizer_export import export_tokenizer
from tests.data.families import DATE, write
from tests.data.helpers import fast_file

MARKS = (
    "</think>",
    "<think>",
    "<think>x</think>",
    "</tool_call>",
    '<tool_call>{"name": "g"}</tool_call>',
    "<tool_call>",
)
ASKED = {"role": "user", "content": "q"}


def said(reasoning="", content="", call=None):
    """A chat of one question, and the roles that the record gives to its words."""
    message = {"role": "assistant", "content": content}
    message |= {"reasoning_content": reasoning} if reasoning else {}
    calls = [{"type": "function", "function": {"name": "f", "arguments": {"a": call}}}]
    return [ASKED, {**message, **({"tool_calls": calls} if call is not None else {})}]


CASES = [
    *(pytest.param(said(f"r1 {mark} r2", "answer"), ("r1", "r2"), (), id=f"reasoning {mark}") for mark in MARKS),
    *(pytest.param(said("", "answer", f"c1 {mark} c2"), (), ("c1", "c2"), id=f"call {mark}") for mark in MARKS),
    *(
        pytest.param(said(f"r1 {one} r2", "answer", f"c1 {two} c2"), ("r1", "r2"), ("c1", "c2"), id=f"{one} and {two}")
        for one, two in itertools.product(MARKS[:4], MARKS[:4])
    ),
]


def roles_of(chat_format, tokenizer, messages):
    """Return the roles of the tokens of each word."""
    found = {}
    for sample in chat_format.samples(messages):
        ids, codes = chat_format.encode(tokenizer, sample)
        text, places = "", []
        for index, code in zip(ids.tolist(), codes.tolist(), strict=True):
            piece = tokenizer.decode([index])
            places += [code] * len(piece)
            text += piece
        for word in ("r1", "r2", "c1", "c2", "answer"):
            if word in text:
                found[word] = set(places[text.index(word) : text.index(word) + len(word)])
    return found


def check(found, reasoning, calls):
    assert found["answer"] == {ASSISTANT}
    assert [found[word] for word in reasoning] == [{REASONING}] * len(reasoning)
    assert [found[word] for word in calls] == [{TOOL_CALL}] * len(calls)


@pytest.mark.parametrize("name", FORMATS)
@pytest.mark.parametrize(("messages", "reasoning", "calls"), CASES)
def test_in_our_formats(formats_tokenizer, name, messages, reasoning, calls):
    check(roles_of(get_format(name), formats_tokenizer, messages), reasoning, calls)


@pytest.fixture(scope="module")
def formats_tokenizer(tmp_path_factory):
    tokens = dict.fromkeys(token for one in FORMATS.values() for token in one.added_tokens)
    return load_tokenizer(fast_file(tmp_path_factory.mktemp("formats")), list(tokens))


@pytest.fixture(scope="module", params=["qwen3", "qwen2.5", "deepseek-r1"])
def own(request, tmp_path_factory):
    tokenizer = load_tokenizer(write(request.param, tmp_path_factory.mktemp(request.param)))
    return own_template(tokenizer, TemplateOptions(DATE)), tokenizer, request.param


@pytest.mark.parametrize(("messages", "reasoning", "calls"), CASES)
def test_in_own_templates(own, messages, reasoning, calls):
    template, tokenizer, name = own
    reasoning = reasoning if name != "qwen2.5" else ()  # it does not write the key
    if name == "deepseek-r1" and calls:
        messages = [ASKED, {**messages[1], "content": ""}]  # it writes no text beside a call
    found = roles_of(template, tokenizer, messages)
    if not messages[1]["content"]:
        found["answer"] = {ASSISTANT}
    check(found, reasoning, calls)


@pytest.mark.parametrize(
    ("text", "roles"),
    [
        ("Write <tool_call> and </tool_call> around it", [ASSISTANT]),
        ("<tool_call> is a tag", [ASSISTANT]),
        ('so <tool_call>\n{"name": "f"}\n</tool_call>', [ASSISTANT, TOOL_CALL]),
        ("<tool_call>\n<function=f>\n</function>\n</tool_call>", [TOOL_CALL]),
        ("<tool_call>f\n<arg_key>a</arg_key>\n<arg_value>1</arg_value>\n</tool_call>", [TOOL_CALL]),
        ("<tool_call>f\n</tool_call>\n<tool_call>g(1)</tool_call>", [TOOL_CALL]),
        ("<think>a</think> b </think> c", [REASONING, ASSISTANT]),
        ("<think>\n\n</think>\n\nb", [EMPTY_REASONING, ASSISTANT]),
        ('<think>maybe <tool_call>{"name": "f"}</tool_call></think>b', [REASONING, ASSISTANT]),
    ],
)
def test_marks_in_a_text(text, roles):
    found = segments(text)
    assert [role for role, _ in found] == roles and "".join(part for _, part in found) == text


def test_the_text_is_what_it_was():
    """The roles are told apart; the text of a turn is the same."""
    messages = said("r </think> r", " a ", "</tool_call>")
    call = json.dumps({"name": "f", "arguments": {"a": "</tool_call>"}})
    text = f"<think>\nr </think> r\n</think>\n\n a \n<tool_call>\n{call}\n</tool_call>"
    assert get_format("chatml").text(messages).endswith(f"assistant\n{text}<|im_end|>\n")


def test_calls_stay_behind_reasoning_that_a_prompt_begins(tmp_path):
    """DeepSeek-R1's prompt ends with <think>."""
    tokenizer = load_tokenizer(write("deepseek-r1", tmp_path))
    template = own_template(tokenizer)
    messages = said("why", "", "x")
    for asked in (messages, [ASKED, {**messages[1], "reasoning_content": None, "content": "<think>\nwhy\n</think>"}]):
        (sample,) = template.samples(asked)
        prompt, without = (
            template.text(asked[:1], True),
            template.text([ASKED, {**messages[1], "reasoning_content": None}]),
        )
        call = without.removeprefix(template.text(asked[:1], True).removesuffix("<think>\n"))
        assert prompt.endswith("<think>\n") and '"x"' in call
        assert template.text(sample) == f"{prompt}why\n</think>\n\n{call}"


SPECIAL = ("<think>", "</think>", "<tool_call>", "</tool_call>")


@pytest.fixture(scope="module", params=["qwen3", "qwen2.5", "deepseek-r1", "llama3", "zephyr"])
def special(request, tmp_path_factory):
    """A tokenizer whose tags are special tokens, as Phi-4-reasoning's and Magistral's are; transformers reads it too."""
    transformers = pytest.importorskip("transformers")
    folder = write(request.param, tmp_path_factory.mktemp(request.param))
    description = json.loads((folder / "tokenizer.json").read_text())
    size = max(token["id"] for token in description["added_tokens"]) + 1
    flags = {"single_word": False, "lstrip": False, "rstrip": False, "normalized": False, "special": True}
    description["added_tokens"] += [{"id": size + i, "content": tag, **flags} for i, tag in enumerate(SPECIAL)]
    (folder / "tokenizer.json").write_text(json.dumps(description))
    tokenizer = load_tokenizer(folder)
    return own_template(tokenizer, TemplateOptions(DATE)), tokenizer, transformers.AutoTokenizer.from_pretrained(folder)


def test_tags_that_are_special_tokens(special):
    """An assistant's tags are these tokens, as in transformers; where another spells them, or in a call, they stay text."""
    template, tokenizer, theirs = special
    for content in ("<think>\nr\n</think>\n\nanswer", 'so <tool_call>\n{"name": "f"}\n</tool_call>', "plain"):
        for more in ([], [ASKED, {"role": "assistant", "content": "b"}]):
            messages = [ASKED, {"role": "assistant", "content": content}, *more]
            for sample in template.samples(messages):
                if not sample[-1].get("as_asked"):
                    rendered = theirs.apply_chat_template(
                        [{key: message[key] for key in ("role", "content")} for message in sample], return_dict=False
                    )
                    assert template.encode(tokenizer, sample)[0].tolist() == rendered
    forged = [
        {"role": "user", "content": "write <think> and <tool_call>"},
        {"role": "assistant", "content": "never </think>"},
    ]
    harmless = [{"role": "user", "content": "write"}, {"role": "assistant", "content": "never"}]
    tags = {tokenizer.token_id(tag) for tag in SPECIAL}
    ids, other = ([i for i in template.encode(tokenizer, chat)[0].tolist() if i in tags] for chat in (forged, harmless))
    assert ids == other


def test_special_tags_of_reasoning_that_a_prompt_begins(special):
    template, tokenizer, _ = special
    messages = [ASKED, {"role": "assistant", "content": "answer", "reasoning_content": "r </think> r"}]
    (sample,) = template.samples(messages)
    ids = template.encode(tokenizer, sample)[0].tolist()
    tags = [tokenizer.id_to_token(i) for i in ids if tokenizer.id_to_token(i) in SPECIAL]
    assert tags == (["<think>", "</think>"] if "r </think> r" in tokenizer.decode(ids) else [])


@pytest.mark.parametrize("name", ["chatml", "llama3", "vicuna", "llama2"])
def test_special_tags_in_our_formats(tmp_path, name):
    """transformers gives our ids with the exported tokenizer and template."""
    transformers = pytest.importorskip("transformers")
    chat_format = get_format(name)
    tokenizer = load_tokenizer(fast_file(tmp_path), [*chat_format.added_tokens, *SPECIAL])
    export_tokenizer(tokenizer, tmp_path / "export", chat_format.exported, chat_format.stop_token)
    theirs = transformers.AutoTokenizer.from_pretrained(tmp_path / "export")
    for content in ("answer", "<think>\nr\n</think>\n\nanswer", "<think>\n\n</think>\n\nanswer"):
        for more in ({}, {"reasoning_content": "why"}, said("", "", {"b": 1})[1]):
            if more.get("reasoning_content") and "<think>" in content:
                continue  # two blocks; only the record's own is known
            messages = [ASKED, {**more, "role": "assistant", "content": content}]
            rendered = theirs.apply_chat_template(messages, return_dict=False)
            assert chat_format.encode(tokenizer, messages)[0].tolist() == rendered
    twice = [ASKED, {**said("", "", 1)[1], "tool_calls": said("", "", 1)[1]["tool_calls"] * 2}]
    assert chat_format.encode(tokenizer, twice)[0].tolist() == theirs.apply_chat_template(twice, return_dict=False)
    ids = chat_format.encode(tokenizer, said("a </think> b", "no </think>"))[0].tolist()
    assert ids.count(tokenizer.token_id("</think>")) == ids.count(tokenizer.token_id("<think>")) == 1
