"""The environment of chat templates, function by function, beside transformers' own."""

import json

import pytest

from megatron_ft.data.template_environment import as_passed, compile_template, compile_traced, marked
from megatron_ft.data.template_files import named_tokens
from megatron_ft.data.traced import labelled, runs_of, written
from tests.data.families import FixedDate

utils = pytest.importorskip("transformers.utils.chat_template_utils")
CALL = {"function": {"name": "f", "arguments": {"b": "é <x>", "a": [1, None, True]}}}
MESSAGES = [
    {"role": "system", "content": " be Kind \n", "name": None},
    {"role": "user", "content": "a<b>\n\nx, y, z"},
    {"role": "assistant", "content": "<think>\nr\n</think>\n\nso", "tool_calls": [CALL, CALL], "thinking": "hm"},
    {"role": "user", "content": [{"type": "text", "text": "part"}, {"type": "image"}]},
]
DOCUMENTS = [{"title": "t", "text": "d"}]
PIECES = [
    "{{ messages[2].tool_calls | tojson }}",
    "{{ messages[2].tool_calls[0] | tojson(indent=2) }}",
    "{{ messages[2].tool_calls[0] | tojson(ensure_ascii=true) }}",
    "{{ messages[2].tool_calls[0] | tojson(separators=(',', ':'), sort_keys=true) }}",
    "{{ messages[2].tool_calls[0] | tojson(False, 1, (',', ':'), True) }}",
    "{{ messages[1].content | tojson }}|{{ messages | tojson }}|{{ tools | tojson }}",
    "{{ strftime_now('%d %b %Y') }}|{{ strftime_now is defined }}",
    "{{ documents }}|{{ documents is none }}|{% for d in documents %}{{ d.title ~ ': ' ~ d['text'] }}{% endfor %}",
    "{{ tools }}|{{ tools is none }}|{{ nothing is defined }}|{{ nothing }}|{{ bos_token }}",
    "{% for m in messages %}{% if loop.index == 2 %}{% continue %}{% endif %}{% if loop.last %}{% break %}{% endif %}{{ m.role }}"
    "{% endfor %}",
    "{% generation %}{{ messages[1].content }}{% endgeneration %}|{%- generation -%} x {%- endgeneration -%} y",
    "{{ raise_exception('no') }}",
    "{{ dict(a=1) }}|{{ dict.fromkeys([1, 2], 3) }}",
    "{% set ns = namespace(a=1, b='x') %}{% set ns.a = ns.a + 1 %}{{ ns.a }}{{ ns.b }}",
    "{% set ns = namespace(_a=1) %}",
    "{{ messages[0].content | trim }}|{{ messages[0].content.strip() }}|{{ messages[0].content.strip('\n') }}",
    "{{ messages[2].content.split('</think>')[-1].lstrip('\n') }}|{{ messages[2].content.split('</think>')[0].split('<think>')[1] }}",
    "{{ messages[1].content.split() }}|{{ messages[1].content.splitlines() }}|{{ messages[1].content.rsplit(',', 1)[0] }}",
    "{{ messages[1].content.replace('x', '**').upper() }}|{{ messages[1].content | replace(', ', ';') | title }}",
    "{{ messages[1].content[2:5] }}|{{ messages[1].content[::-1] }}|{{ messages[1].content[0] }}|{{ messages[1].content | length }}",
    "{{ ', '.join(['a', messages[1].content]) }}|{{ [messages[1].content, 1] | join('-') }}",
    "{{ messages | map(attribute='role') | join(' ') }}",
    "{{ 'a' ~ messages[1].content ~ 1 }}|{{ '%s!' % messages[1].content }}|{{ '{}?'.format(messages[1].content) }}",
    "{{ messages[1].content.startswith('a') and 'x' in messages[1].content }}|{{ messages[1].content is string }}",
    "{{ messages[3].content is iterable }}|{% for p in messages[3].content %}{{ p.type }}{{ p.text if p.type == 'text' }}{% endfor %}",
    "{{ messages[2].reasoning_content }}|{{ messages[2].thinking }}|{{ 'name' in messages[0] }}|{{ messages[0].name is defined }}",
    "{% macro say(m, end='.') %}[{{ m.content }}{{ end }}]{% endmacro %}{{ say(messages[1]) }}|{{ say(messages[0], '!') | trim }}",
    "{% set x %}  {{ messages[1].content }} {% endset %}{{ x | trim }}{% filter upper %}{{ messages[1].content }}{% endfilter %}",
    "{%- for k, v in messages[2].tool_calls[0].function.arguments.items() %}{{ k }}={{ v }};{% endfor %}",
    "{{ messages | selectattr('role', 'equalto', 'user') | list | length }}|{{ messages[-1] == messages[3] }}|{{ messages[::-1][0].role }}",
    "{% for m in messages %}\n    {% if m.role == 'user' %}\n  {{ loop.index0 }}{{ loop.previtem.role }}\n    {% endif %}\n{% endfor %}",
    "{{ messages.append(1) }}",
    "{{ messages[0].__class__ }}",
    "{{ messages[1].content | e }}|{{ messages[1].content | safe }}|{{ messages[1].content | indent(2) }}",
    "{{ messages[1].content | string }}",
    "{{ messages[9].content }}",
    "{{ messages[1].content * 2 }}|{{ messages[1].content + 'x' + messages[0].content }}|{{ messages[1].content == 'a' }}",
    "{{ range(3) | list }}|{{ cycler('a').next() }}|{{ joiner(',')() }}|{{ lipsum is defined }}|{{ [3, 1] | sort | first }}",
]


def outcome(render):
    try:
        return render()
    except Exception as error:
        return type(error).__name__, str(error)


def variables(messages):
    return {
        "messages": messages,
        "tools": None,
        "documents": DOCUMENTS,
        "add_generation_prompt": False,
        "bos_token": "<s>",
    }


@pytest.mark.parametrize("source", PIECES)
def test_as_transformers(source, monkeypatch):
    monkeypatch.setattr(utils, "datetime", FixedDate)
    clock = FixedDate.now().strftime
    plain = [{key: value for key, value in message.items() if value is not None} for message in MESSAGES]

    def theirs():
        (text,), _ = utils.render_jinja_template([plain], None, DOCUMENTS, source, bos_token="<s>")
        return text

    def traced():
        template = compile_traced(source, clock)
        return written(template.root_render_func(template.new_context(variables(marked(as_passed(MESSAGES))))))

    expected = outcome(theirs)
    assert (
        outcome(lambda: compile_template(source, clock).render(variables(as_passed(MESSAGES)))) == expected
        or "_a" in source
    )
    found = outcome(traced)
    assert (found if isinstance(found, tuple) else "".join((found,))) == expected or "_a" in source


def test_the_same_names_are_there():
    ours, theirs = compile_template("", lambda form: form).environment, utils._compile_jinja_template("").environment
    assert set(ours.filters) == set(theirs.filters) and set(ours.tests) == set(theirs.tests)
    assert set(ours.globals) == set(theirs.globals)
    assert (ours.trim_blocks, ours.lstrip_blocks) == (theirs.trim_blocks, theirs.lstrip_blocks)
    tags = [{tag for extension in one.extensions.values() for tag in extension.tags} for one in (ours, theirs)]
    assert tags[0] == tags[1]
    traced = compile_traced("", lambda form: form).environment
    assert set(theirs.filters) == set(traced.filters) and set(theirs.globals) <= set(traced.globals)


METHODS = [
    lambda s: s[1:], lambda s: s[:-2], lambda s: s[3], lambda s: s.strip(), lambda s: s.lstrip(" a"), lambda s: s.rstrip(), lambda s: s * 2,
    lambda s: s.split(" ", 1)[-1], lambda s: s.rsplit(None, 1)[0], lambda s: s.partition("b")[2],
    lambda s: s.rpartition("b")[0], lambda s: s.replace("b", "--"), lambda s: s.removeprefix(" a"),
    lambda s: s.removesuffix("c "), lambda s: "x" + s + "y", lambda s: s + s, lambda s: s.upper(), lambda s: s.splitlines()[0],
    lambda s: s.splitlines(keepends=True)[-1], lambda s: s[::-1], lambda s: s.join(["1", "2"]), lambda s: s.title(), lambda s: s[10:],
]  # fmt: skip


@pytest.mark.parametrize("change", METHODS)
def test_text_that_is_traced_is_changed_as_text_is(change):
    from megatron_ft.data.traced import OWN, Label

    text = " ab\nb ßc "
    runs = [(2, Label(0)), (4, OWN), (len(text) - 6, Label(1))]
    from megatron_ft.data.traced import traced

    found = change(traced(text, runs))
    assert found == change(text)
    assert sum(length for length, _ in runs_of(found)) == len(found)
    where = {
        letter: label
        for letter, label in zip(text, [one for length, one in runs for _ in range(length)], strict=True)
        if letter in "aß"
    }
    at = 0
    for length, label in runs_of(found):
        for letter in found[at : at + length]:
            assert letter not in where or label == where[letter]
        at += length
    assert labelled("", Label(0)) == ""


def test_tokens_of_every_file(tmp_path):
    from transformers import PreTrainedTokenizerFast

    from tests.data.helpers import fast_file

    fast_file(tmp_path)
    (tmp_path / "special_tokens_map.json").write_text(
        json.dumps({"bos_token": "<eos>", "eos_token": {"content": "<unk>"}, "cls_token": "<eos>"})
    )
    config = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "eos_token": "<eos>",
        "extra_special_tokens": {"image_token": "<unk>", "opening": "<eos>"},
    }
    (tmp_path / "tokenizer_config.json").write_text(json.dumps(config))
    theirs = PreTrainedTokenizerFast.from_pretrained(tmp_path).special_tokens_map
    ours = named_tokens(tmp_path)
    names = ("bos_token", "eos_token", "cls_token", "image_token", "opening")
    assert {key: ours.get(key) for key in names} == {key: theirs.get(key) for key in names}


@pytest.mark.parametrize("arguments", ["", "ensure_ascii=true", "indent=1", "separators=(',', ':'), sort_keys=true"])
def test_texts_in_objects_that_a_template_makes_are_known(arguments):
    """Tool results of Mistral's templates: {'content': message.content} | tojson."""
    from megatron_ft.data.traced import PLAIN

    clock, text = lambda form: form, 'é "2"\n{x}'
    messages = [{"role": "user", "content": "q"}, {"role": "tool", "content": text, "name": "f"}]
    source = (
        "{{ {'name': 'f', 'content': [messages[1].content ~ '!', 1]} | tojson("
        + arguments
        + ") }}|{{ messages | tojson }}"
    )
    whole = compile_template(source, clock).render(messages=messages)
    template = compile_traced(source, clock)
    found = written(template.root_render_func(template.new_context({"messages": marked(messages)})))
    assert "".join((found,)) == whole
    at, known = 0, []
    for length, label in runs_of(found):
        known += [(label.message, label.kind, whole[at : at + length])] if label.message is not None else []
        at += length
    escaped = [json.dumps(text, ensure_ascii=ascii)[1:-1] for ascii in (bool("ascii" in arguments), False)]
    assert known == [(1, PLAIN, escaped[0] + "!"), (0, PLAIN, "q"), (1, PLAIN, escaped[1])]
