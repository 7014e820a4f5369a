"""What a template has no place for is refused or counted, and what it writes on its own account is nobody's answer."""

import json

import numpy as np
import pytest

from megatron_ft.data.chat_template import TemplateOptions, own_template
from megatron_ft.data.roles import SPOKEN, TOOL_CALL
from megatron_ft.data.tokenizer import load_tokenizer
from megatron_ft.errors import DataError
from tests.data.families import DATE, FAMILIES, TOOLS, write

ASKED = {"role": "user", "content": "hello plum"}
CALLED = [{"type": "function", "id": "call00001", "function": {"name": "add", "arguments": {"a": 1, "b": ["plum"]}}}]
RESULT = {"role": "tool", "name": "add", "content": "2", "tool_call_id": "call00001"}


def says(text, **more):
    return {"role": "assistant", "content": text, **more}


@pytest.fixture(scope="module")
def desk(tmp_path_factory):
    made = {}

    def get(name, **options):
        if name not in made:
            made[name] = load_tokenizer(write(name, tmp_path_factory.mktemp(name), kind="bytes"))
        return made[name], own_template(made[name], TemplateOptions(DATE, **options))

    return get


def trained(desk, name, messages, **options):
    """What is trained on in all samples of a chat."""
    tokenizer, own = desk(name, **options)
    encoded = own.encode_many(tokenizer, own.samples(messages))
    return "".join(tokenizer.decode(ids[np.isin(roles, SPOKEN)]) for ids, roles in encoded)


@pytest.mark.parametrize(
    ("name", "answers", "lost"),
    [
        ("llama3", [says("", tool_calls=CALLED)], '\'{"name": "add"'),
        ("phi4", [says("plum", tool_calls=CALLED)], '\'{"name": "add"'),
        ("llama3.1", [says("plum", tool_calls=CALLED), RESULT, says("plum")], "'plum' of message 2"),
        ("mistral-v0.3", [says("let me see", tool_calls=CALLED), RESULT, says("two")], "'let me see' of message 2"),
        ("deepseek-r1", [says("let me see", tool_calls=CALLED), RESULT, says("two")], "'let me see' of message 2"),
        ("deepseek-r1", [says("one<think>hm</think>two")], "'one' of message 2"),
        ("qwen3", [says("one<think>hm</think>two")], "'one' of message 2"),
        ("qwen3", [says("one</think>two</think>three")], "'two' of message 2"),
    ],
)
def test_a_part_of_an_answer_without_a_place_is_refused(desk, name, answers, lost):
    with pytest.raises(DataError, match=r"leaves out or changes .*role assistant") as raised:
        trained(desk, name, [ASKED, *answers])
    assert lost in str(raised.value)


def test_calls_of_which_only_the_first_is_written(tmp_path):
    from tests.data.test_chat_formats import with_template

    source = (
        "{% for m in messages %}<|im_start|>{{ m.role + '\n' + m.content }}{% if m.tool_calls %}"
        "{{ m.tool_calls[0].function.name ~ m.tool_calls[0].function.arguments.a }}{% endif %}<|im_end|>{% endfor %}"
    )
    tokenizer = with_template(tmp_path, source)
    own = own_template(tokenizer)
    call, other = ({"function": {"name": name, "arguments": {"a": 1}}} for name in ("add", "take"))
    ids, roles = own.encode(tokenizer, [ASKED, says("", tool_calls=[call])])
    assert "add1" in tokenizer.decode(ids) and TOOL_CALL in roles
    for messages, lost in (([call, other], "'take'"), ([{"function": {"name": "add", "arguments": {"b": 2}}}], "'b'")):
        with pytest.raises(DataError, match=f"{lost} of message 2"):
            own.encode(tokenizer, [ASKED, says("", tool_calls=messages)])


def test_what_has_a_place_is_taken(desk):
    assert "<think>\nhm\n</think>\n\ntwo" in trained(desk, "qwen3", [ASKED, says("two", reasoning_content="hm")])
    assert "hm\n</think>\n\ntwo" in trained(desk, "deepseek-r1", [ASKED, says("<think>hm\n</think>\n\ntwo")])
    assert "one<think>hm</think>two" in trained(desk, "zephyr", [ASKED, says("one<think>hm</think>two")])
    earlier = [ASKED, says("<think>hm</think>two"), {**ASKED, "content": "and?"}, says("three")]
    assert "hm" not in trained(desk, "qwen3", earlier, rewritten="one")
    prompt = [ASKED, says("let me see", tool_calls=CALLED), RESULT]
    tokenizer, own = desk("llama3.1")
    assert len(own.encode(tokenizer, prompt, add_generation_prompt=True)[0])


def test_for_what_templates_have_a_place(desk):
    places = {name: sorted(desk(name)[1].places) for name in FAMILIES}
    assert [name for name, known in places.items() if "reasoning_content" in known] == ["qwen3", "deepseek-r1"]
    tools = ["llama3.1", "llama3.2", "qwen2.5", "qwen3", "mistral-v0.3", "command-r"]
    assert [name for name, known in places.items() if "tools" in known] == tools
    assert not any("name" in known for known in places.values())


@pytest.mark.parametrize("name", ["qwen2.5", "llama3", "llama3.1", "phi4", "zephyr", "deepseek-r1"])
def test_a_chat_that_begins_with_an_answer(desk, name):
    """The system message of the template, its date and the tools are not the assistant's."""
    first = says("welcome", tools=TOOLS)
    text = trained(desk, name, [first, ASKED, says("bye")])
    assert "welcome" in text and "bye" in text
    assert not any(part in text for part in ("sum", "You are", "Today", "Call one", "plum"))


@pytest.mark.parametrize("name", [name for name, family in FAMILIES.items() if "tools" in family.takes])
def test_a_token_that_a_definition_spells_stays_text(desk, name):
    tokenizer, own = desk(name)
    forged = json.loads(json.dumps(TOOLS).replace("sum", f"sum {FAMILIES[name].stop} {FAMILIES[name].stop}"))
    counts = []
    for tools in (TOOLS, forged):
        ids, _ = own.encode(tokenizer, [{**ASKED, "tools": tools}, says("two")])
        counts.append([np.count_nonzero(ids == i) for i in tokenizer.special_tokens.values()])
    assert counts[0] == counts[1]


TURN = "<|im_start|>{}\n{}<|im_end|>"
WAYS = {
    "format": "{% for m in messages %}{{ '<|im_start|>{}\n{}<|im_end|>'.format(m.role, m.content) }}{% endfor %}",
    "format by name": "{% for m in messages %}{{ '<|im_start|>{r}\n{c}<|im_end|>'.format(r=m.role, c=m.content) }}{% endfor %}",
    "percent": "{% for m in messages %}{{ '<|im_start|>%s\n%s<|im_end|>' % (m.role, m.content) }}{% endfor %}",
    "format filter": "{% for m in messages %}{{ '<|im_start|>%s\n%s<|im_end|>' | format(m.role, m.content) }}{% endfor %}",
    "safe": "{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content | safe }}<|im_end|>{% endfor %}",
    "center": "{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content | center(3) }}<|im_end|>{% endfor %}",
    "join": "{% for m in messages %}{{ ''.join(['<|im_start|>', m.role, '\n', m.content, '<|im_end|>']) }}{% endfor %}",
    "macro": "{% macro say(m, end) %}<|im_start|>{{ m.role }}\n{{ m.content }}{{ end }}{% endmacro %}"
    "{% for m in messages %}{{ say(m, end='<|im_end|>') }}{% endfor %}",
    "call": "{% macro box() %}<|im_start|>{{ caller() }}<|im_end|>{% endmacro %}"
    "{% for m in messages %}{% call box() %}{{ m.role }}\n{{ m.content }}{% endcall %}{% endfor %}",
    "namespace": "{% set ns = namespace(o='') %}{% for m in messages %}{% set ns.o = ns.o ~ '<|im_start|>' ~ m.role ~ '\n' ~ m.content ~ "
    "'<|im_end|>' %}{% endfor %}{{ ns.o }}",
    "format in a namespace": "{% set ns = namespace(o='') %}{% for m in messages %}"
    "{% set ns.o = ns.o ~ '<|im_start|>%s\n%s<|im_end|>' % (m.role, m.content) %}{% endfor %}{{ ns.o }}",
    "pairs": "{% for q, a in messages | batch(2) %}<|im_start|>user\n{{ q.content }}<|im_end|><|im_start|>assistant\n"
    "{{ a.content }}<|im_end|>{% endfor %}",
    "loop controls": "{% for m in messages %}{% if not m.content %}{% continue %}{% endif %}<|im_start|>{{ m.role }}\n"
    "{{ m.content }}<|im_end|>{% if loop.index > 50 %}{% break %}{% endif %}{% endfor %}",
    "with": "{% for m in messages %}{% with r = m.role, c = m.content %}<|im_start|>{{ r }}\n{{ c }}<|im_end|>{% endwith %}{% endfor %}",
}

# Which have no place of which the whole is the assistant's; a continue cannot stand within marks.
WITHOUT_MARKS = ("namespace", "format in a namespace", "pairs", "loop controls")


@pytest.mark.parametrize("way", WAYS)
def test_ways_to_write_a_turn(tmp_path, way):
    """The ids of transformers, and just the turns of the assistant are trained on."""
    import transformers

    from tests.data.test_chat_formats import with_template

    tokenizer = with_template(tmp_path, WAYS[way])
    own, theirs = own_template(tokenizer), transformers.AutoTokenizer.from_pretrained(tmp_path)
    texts = ["user", "the dog 二", "and\n{{ x }}? ", "user assistant"]
    messages = [{"role": ("user", "assistant")[i % 2], "content": text} for i, text in enumerate(texts)]
    ids, roles = own.encode(tokenizer, messages)
    assert ids.tolist() == theirs.apply_chat_template(messages, return_dict=False)
    spoken = tokenizer.decode(ids[np.isin(roles, SPOKEN)])
    assert spoken == "".join(TURN.format("assistant", text) for text in texts[1::2])
    exported = own.exported["default"]
    mask = theirs.apply_chat_template(
        messages, chat_template=exported, return_dict=True, return_assistant_tokens_mask=True
    )
    assert mask["input_ids"] == ids.tolist()
    assert ("generation" in exported) == (way not in WITHOUT_MARKS)
    assert mask["assistant_masks"] == np.isin(roles, SPOKEN).tolist() or way in WITHOUT_MARKS
    forged = [{**message, "content": f"{message['content']}<|im_end|>"} for message in messages]
    again, roles = own.encode(tokenizer, forged)
    end = tokenizer.token_id("<|im_end|>")
    assert np.count_nonzero(again == end) == 4
    assert tokenizer.decode(again[np.isin(roles, SPOKEN)]).count("<|im_end|>") == 4


def test_faults_of_a_template_are_said_in_usual_words(tmp_path):
    from tests.data.test_chat_formats import with_template

    for source, word in (
        ("{{ messages | unique | list }}", "dict"),
        ("{% for d in documents %}{% endfor %}", "a missing value"),
    ):
        with pytest.raises(DataError, match=rf"refuses this chat \(.*{word}") as raised:
            own_template(with_template(tmp_path, source))
        assert "Marked" not in str(raised.value) and "NoneType" not in str(raised.value)
