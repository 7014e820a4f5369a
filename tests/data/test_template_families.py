"""Templates in the manner of published families: the ids that transformers renders, with roles, and the marks of the export."""

from collections.abc import Iterator
from itertools import groupby

import numpy as np
import pytest

from megatron_ft.data.chat_template import TemplateOptions, own_template
from megatron_ft.data.roles import ASSISTANT, CONTEXT, EMPTY_REASONING, PROMPTER, REASONING, SPOKEN, SYSTEM, TOOL_CALL
from megatron_ft.data.template_environment import as_passed
from megatron_ft.data.tokenizer import load_tokenizer
from megatron_ft.data.tokenizer_export import export_tokenizer
from megatron_ft.errors import DataError, TokenizerError
from tests.data.families import CHATS, DATE, FAMILIES, FixedDate, chat, write

transformers = pytest.importorskip("transformers")
PAIRS = [(name, kind) for name, family in FAMILIES.items() for kind in family.takes if kind != "forged"]


@pytest.fixture(autouse=True)
def fixed_date(monkeypatch):
    monkeypatch.setattr("transformers.utils.chat_template_utils.datetime", FixedDate)


@pytest.fixture(scope="module")
def desk(tmp_path_factory):
    """Name -> (our tokenizer, our template, transformers' tokenizer)."""
    made = {}

    def get(name):
        if name not in made:
            folder = write(name, tmp_path_factory.mktemp(name))
            tokenizer = load_tokenizer(folder)
            theirs = transformers.AutoTokenizer.from_pretrained(folder)
            made[name] = (tokenizer, own_template(tokenizer, TemplateOptions(DATE)), theirs)
        return made[name]

    return get


def rendered(theirs, messages, prompt=False, **more):
    tools = next((message["tools"] for message in messages if message.get("tools")), None)
    plain = [{k: v for k, v in m.items() if k not in ("tools", "only_read", "as_asked")} for m in messages]
    return theirs.apply_chat_template(plain, tools=tools, add_generation_prompt=prompt, return_dict=False, **more)


def stretches(tokenizer, ids, codes) -> Iterator[tuple[int, str]]:
    for role, group in groupby(zip(codes.tolist(), ids.tolist(), strict=True), key=lambda one: one[0]):
        yield role, tokenizer.decode([index for _, index in group])


@pytest.mark.parametrize(("name", "kind"), PAIRS)
def test_transformers_renders_our_ids(desk, name, kind):
    tokenizer, own, theirs = desk(name)
    messages = chat(kind, FAMILIES[name])
    for end in range(1, len(messages) + 1):
        for prompt in (False, True):
            try:
                expected = rendered(theirs, messages[:end], prompt)
            except Exception as error:
                assert "TemplateError" in type(error).__name__, (name, kind)
                continue
            if (
                messages[:end] == [messages[0]]
                and messages[0]["role"] == "system"
                and "kind" not in theirs.decode(expected)
            ):
                continue  # it is written with the question
            assert own.encode(tokenizer, messages[:end], prompt)[0].tolist() == expected, (end, prompt)
    assert own.stop_token == FAMILIES[name].stop


@pytest.mark.parametrize(("name", "kind"), PAIRS)
def test_samples_are_what_a_model_sees(desk, name, kind):
    """Each answer is trained on once, behind the prompt that transformers makes for it."""
    tokenizer, own, theirs = desk(name)
    messages = chat(kind, FAMILIES[name])
    answers = [i for i, message in enumerate(messages) if message["role"] == "assistant"]
    trained = []
    for sample in own.samples(messages):
        ids, codes = own.encode(tokenizer, sample)
        read = [message.get("only_read", False) for message in sample]
        for i in (i for i in answers if i < len(sample) and not read[i]):
            prompt = rendered(theirs, messages[:i], prompt=True)
            trained.append(i)
            if len(sample) == len(messages) == i + 1 or sample[-1].get("as_asked") or i == len(sample) - 1:
                assert ids[: len(prompt)].tolist() == prompt or not sample[-1].get("as_asked")
        assert np.isin(codes, SPOKEN).any()
    assert sorted(trained) == answers


@pytest.mark.parametrize("name", FAMILIES)
def test_a_forged_token_stays_text(desk, name):
    tokenizer, own, _ = desk(name)
    forged, harmless = chat("forged", FAMILIES[name]), CHATS["several turns"][:4]
    ids, other = (own.encode(tokenizer, messages)[0] for messages in (forged, harmless))
    for index in tokenizer.special_tokens.values():
        if tokenizer.id_to_token(index) != "<unk>":
            assert np.count_nonzero(ids == index) == np.count_nonzero(other == index)


@pytest.mark.parametrize("name", [name for name, family in FAMILIES.items() if "system" in family.takes])
def test_roles_of_ordinary_turns(desk, name):
    tokenizer, own, _ = desk(name)
    (*_, sample) = own.samples(CHATS["system"])
    ids, codes = own.encode(tokenizer, sample)
    said = list(stretches(tokenizer, ids, codes))
    assert said[0][0] in (SYSTEM, PROMPTER)
    answers = "".join(text for role, text in said if role in SPOKEN)
    assert "wizard" in answers and "and?" not in answers and "kind" not in answers
    assert "kind" in "".join(text for role, text in said if role == SYSTEM)


def test_the_roles_of_a_call(desk):
    called = {
        "qwen2.5": '<tool_call>\n{"name": "add", "arguments": {"a": 1, "b": "é <x>"}}\n</tool_call>',
        "llama3.1": '{"name": "add", "parameters": {"a": 1, "b": "é <x>"}}',
        "command-r": '[{"tool_name": "add", "parameters": {"a": 1, "b": "é <x>"}}]\n```',
        "deepseek-r1": "<|tool_calls_begin|><|tool_call_begin|>function<|tool_sep|>add\n```json\n"
        '{"a": 1, "b": "é <x>"}\n```<|tool_call_end|><|tool_calls_end|>',
    }
    for name, text in called.items():
        tokenizer, own, _ = desk(name)
        said = list(stretches(tokenizer, *own.encode(tokenizer, chat("JSON result", FAMILIES[name]))))
        assert [part for role, part in said if role == TOOL_CALL] == [text], name
        assert any("sum" in part for role, part in said if role == CONTEXT) or name == "command-r", name
        assert "two" in said[-1][1] or "two" in said[-2][1]


def test_qwen3_as_samples(desk):
    tokenizer, own, theirs = desk("qwen3")
    first, second = own.samples(CHATS["thinking"])
    assert list(stretches(tokenizer, *own.encode(tokenizer, first)))[1:] == [
        (ASSISTANT, "<|im_start|>assistant\n"), (REASONING, "<think>\nthe fox\n</think>\n\n"), (ASSISTANT, "the dog<|im_end|>\n")
    ]  # fmt: skip
    said = list(stretches(tokenizer, *own.encode(tokenizer, second)))
    assert said[1] == (CONTEXT, "<|im_start|>assistant\nthe dog<|im_end|>\n")
    assert (REASONING, "<think>\nwizards\n</think>\n\n") in said
    assert own.encode(tokenizer, first)[0].tolist() == rendered(theirs, CHATS["thinking"][:2])
    assert own.encode(tokenizer, second)[0].tolist() == rendered(theirs, CHATS["thinking"])
    one = own_template(tokenizer, TemplateOptions(rewritten="one"))
    assert one.samples(CHATS["thinking"]) == [CHATS["thinking"]]
    spoken = list(stretches(tokenizer, *own.encode(tokenizer, CHATS["one turn"])))
    assert (EMPTY_REASONING, "<think>\n\n</think>\n\n") in spoken
    keyed = [own.encode(tokenizer, sample)[0].tolist() for sample in own.samples(CHATS["reasoning key"])]
    assert keyed == [own.encode(tokenizer, sample)[0].tolist() for sample in (first, second)]
    ends = own_template(tokenizer, TemplateOptions(arguments={"enable_thinking": False}))
    asked = rendered(theirs, CHATS["one turn"][:1], True, enable_thinking=False)
    assert ends.encode(tokenizer, CHATS["one turn"][:1], True)[0].tolist() == asked
    assert tokenizer.decode(asked).endswith("<think>\n\n</think>\n\n")


def test_a_system_message_that_only_prompts_hold(desk):
    """Mistral's template puts it into the last question; the whole chat, which ends with an answer, has none."""
    tokenizer, own, theirs = desk("mistral-v0.3")
    messages = CHATS["system"]
    found = own.samples(messages)
    assert len(found) == 2
    for sample, end in zip(found, (2, 4), strict=True):
        ids, codes = own.encode(tokenizer, sample)
        prompt = rendered(theirs, messages[:end], prompt=True)
        assert ids[: len(prompt)].tolist() == prompt
        assert codes[len(prompt) :].tolist() == [ASSISTANT] * (len(ids) - len(prompt))
        assert SYSTEM in codes
    with pytest.raises(DataError, match="leaves out message 1, of the role system"):
        own_template(tokenizer, TemplateOptions(rewritten="one")).samples(messages)


def test_reasoning_behind_a_prompt_that_begins_it(desk):
    tokenizer, own, theirs = desk("deepseek-r1")
    (_, sample) = own.samples(CHATS["thinking"])
    ids, _ = own.encode(tokenizer, sample)
    prompt = rendered(theirs, CHATS["thinking"][:3], prompt=True)
    assert ids[: len(prompt)].tolist() == prompt
    assert tokenizer.decode(ids[len(prompt) :]) == "wizards\n</think>\n\na wizard<|end_of_sentence|>"


@pytest.mark.parametrize("name", FAMILIES)
def test_the_exported_template_marks_what_shards_say(desk, name, tmp_path):
    tokenizer, own, _ = desk(name)
    export_tokenizer(tokenizer, tmp_path, own.exported, own.stop_token)
    (tmp_path / "config.json").write_text('{"model_type": "llama"}')
    theirs = transformers.AutoTokenizer.from_pretrained(tmp_path)
    assert theirs.pad_token is not None and theirs.eos_token == own.stop_token
    again = own_template(load_tokenizer(tmp_path), TemplateOptions(DATE))
    for kind in FAMILIES[name].takes:
        if kind == "forged":
            continue
        messages = chat(kind, FAMILIES[name])
        tools = next((message["tools"] for message in messages if message.get("tools")), None)
        found = theirs.apply_chat_template(
            as_passed([{k: v for k, v in message.items() if k != "tools"} for message in messages]),
            tools=tools, return_dict=True, return_assistant_tokens_mask=True,
        )  # fmt: skip
        ids, codes = own.encode(tokenizer, messages)
        assert found["input_ids"] == ids.tolist()
        assert found["assistant_masks"] == np.isin(codes, SPOKEN).astype(int).tolist(), kind
        assert [one.tolist() for one in again.encode(tokenizer, messages)] == [ids.tolist(), codes.tolist()], kind


def test_marks_of_the_template_itself_decide(desk, tmp_path):
    """Where an author marked what is trained on, the rest of an answer is context."""
    from tests.data.test_chat_formats import with_template

    source = (
        "{% for m in messages %}{% if m.role == 'assistant' %}<|im_start|>assistant\n{% generation %}{{ m.content }}<|im_end|>\n"
        "{% endgeneration %}{% else %}{{ '<|im_start|>' + m.role + '\n' + m.content + '<|im_end|>\n' }}{% endif %}{% endfor %}"
    )
    tokenizer = with_template(tmp_path, source)
    own = own_template(tokenizer)
    said = list(stretches(tokenizer, *own.encode(tokenizer, CHATS["one turn"])))
    assert said[1:] == [(CONTEXT, "<|im_start|>assistant\n"), (ASSISTANT, "the dog 二<|im_end|>\n")]
    assert own.exported == {"default": source}


def test_a_template_that_asks_for_the_date(tmp_path):
    tokenizer = load_tokenizer(write("llama3.2", tmp_path))
    with pytest.raises((TokenizerError, DataError), match="fix it with --template_date"):
        own_template(tokenizer)
    assert "26 Jul 2024" in own_template(tokenizer, TemplateOptions(DATE)).text(CHATS["one turn"])


def test_templates_by_name(desk):
    tokenizer, own, theirs = desk("command-r")
    assert set(own.exported) == {"default", "tool_use", "rag"}
    documents = [{"title": "t", "text": "a fox"}]
    rag = TemplateOptions(DATE)
    own = own_template(tokenizer, rag)
    own.template.sources = {"default": own.template.sources["rag"]}
    messages = [{**CHATS["one turn"][0], "documents": documents}]
    expected = theirs.apply_chat_template(
        CHATS["one turn"][:1], chat_template="rag", documents=documents, return_dict=False
    )
    assert own.encode(tokenizer, messages)[0].tolist() == expected
