"""Tools in every format: what training sees is what transformers makes of the same messages and definitions."""

import json

import numpy as np
import pytest

from megatron_ft.data.chat_format import ALFRED, CHATML, FORMATS, VICUNA, get_format
from megatron_ft.data.chat_template import OwnTemplate, own_template
from megatron_ft.data.roles import ASSISTANT, TOOL_CALL
from megatron_ft.data.template_text import TemplateText
from megatron_ft.data.tokenizer import load_tokenizer
from megatron_ft.data.tokenizer_export import export_tokenizer
from tests.data.helpers import fast_file, sentencepiece_file

TOOLS = [{"type": "function", "function": {"name": "add", "description": "sum «é»", "parameters": {"type": "object"}}}]
CALL = {"type": "function", "function": {"name": "add", "arguments": {"a": 1, "b": "é <x>"}}}
QUESTION = {"role": "user", "content": "1 + 1?", "tools": TOOLS}
CHAT = [
    QUESTION,
    {"role": "assistant", "content": "Let me see. ", "tool_calls": [CALL, CALL]},
    {"role": "user", "content": "and?"},
    {"role": "assistant", "content": "", "tool_calls": [CALL]},
]
WITH_SYSTEM = [{"role": "system", "content": "be brief", "tools": TOOLS}, {**QUESTION, "tools": []}, *CHAT[1:]]


def plain(chat):
    """As transformers takes them: definitions apart."""
    return [{key: value for key, value in message.items() if key != "tools"} for message in chat]


def test_the_text_by_hand():
    defined = (
        "You can call these functions:\n<tools>\n"
        '{"type": "function", "function": {"name": "add", "description": "sum «é»", "parameters": {"type": "object"}}}\n</tools>\n'
        'To call one, say its name and arguments:\n<tool_call>\n{"name": ..., "arguments": {...}}\n</tool_call>'
    )
    called = '<tool_call>\n{"name": "add", "arguments": {"a": 1, "b": "é <x>"}}\n</tool_call>'
    assert CHATML.text(CHAT[:2]) == (
        f"<|im_start|>system\n{defined}<|im_end|>\n<|im_start|>user\n1 + 1?<|im_end|>\n"
        f"<|im_start|>assistant\nLet me see. \n{called}\n{called}<|im_end|>\n"
    )
    assert CHATML.text(WITH_SYSTEM[:1]) == f"<|im_start|>system\nbe brief\n\n{defined}<|im_end|>\n"
    assert VICUNA.text(CHAT[:1]).startswith(f"<s>{VICUNA.default_system}\n\n{defined} USER: 1 + 1?")


def test_what_a_tool_answers_is_never_the_assistants():
    """Formats without a turn for it: before an answer it is a question of its own."""
    chat = [*CHAT[:2], {"role": "tool", "content": "2"}, {"role": "assistant", "content": "two"}]
    assert "<end_message><start_user>2<end_message><start_assistant>two<end_message>" in ALFRED.text(chat)


@pytest.mark.parametrize("make", [sentencepiece_file, fast_file])
@pytest.mark.parametrize("name", FORMATS)
def test_transformers_gives_our_ids(tmp_path, make, name):
    transformers = pytest.importorskip("transformers")
    (tmp_path / "from").mkdir()
    chat_format = get_format(name)
    tokenizer = load_tokenizer(make(tmp_path / "from"), chat_format.added_tokens)
    export_tokenizer(tokenizer, tmp_path / "to", chat_format.jinja, chat_format.stop_token, 4096)
    (tmp_path / "to/config.json").write_text(json.dumps({"model_type": "llama"}))
    theirs = transformers.AutoTokenizer.from_pretrained(tmp_path / "to")
    own = own_template(load_tokenizer(tmp_path / "to"))
    for chat in (CHAT, WITH_SYSTEM, CHAT[:1], CHAT[2:], WITH_SYSTEM[:3]):
        tools = next((message["tools"] for message in chat if message.get("tools")), None)
        for prompt in (False, True):
            ids = theirs.apply_chat_template(plain(chat), tools=tools, add_generation_prompt=prompt, return_dict=False)
            assert chat_format.encode(tokenizer, chat, prompt)[0].tolist() == ids, (chat, prompt)
            assert own.encode(tokenizer, chat, prompt)[0].tolist() == ids, (chat, prompt)
    ids, role_bytes = own.encode(tokenizer, CHAT)
    called = tokenizer.decode(ids[role_bytes == TOOL_CALL]).replace("▁", " ")
    assert called.count("<tool_call>") == 3 and "You can call" not in called
    assert "Let me see" in tokenizer.decode(ids[role_bytes == ASSISTANT]).replace("▁", " ")


TEMPLATE = (
    "{% if tools %}<|im_start|>system\n{% for t in tools %}{{ t.function.name }}: {{ t | tojson }};{% endfor %}<|im_end|>\n{% endif %}"
    "{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content }}"
    "{% if m.tool_calls %}{% for c in m.tool_calls %}[{{ c.function.name }}({{ c.function.arguments | tojson }})]{% endfor %}"
    "{% elif not m.content %}nothing{% endif %}<|im_end|>\n{% endfor %}"
)


def test_a_tokenizers_own_template_renders_them(tmp_path):
    tokenizer = load_tokenizer(sentencepiece_file(tmp_path), CHATML.added_tokens)
    own = OwnTemplate(TemplateText({"default": TEMPLATE}, {}, list(tokenizer.special_tokens)))
    text = own.text([*CHAT[:2], {"role": "tool", "content": "2", "tool_call_id": "1"}])
    assert text == (
        f"<|im_start|>system\nadd: {json.dumps(TOOLS[0], ensure_ascii=False)};<|im_end|>\n<|im_start|>user\n1 + 1?<|im_end|>\n"
        '<|im_start|>assistant\nLet me see. [add({"a": 1, "b": "é <x>"})][add({"a": 1, "b": "é <x>"})]<|im_end|>\n'
        "<|im_start|>tool\n2<|im_end|>\n"
    )
    ids, role_bytes = own.encode(tokenizer, CHAT[2:])
    assert np.count_nonzero(ids == tokenizer.token_id("<|im_end|>")) == 2
    assert '[add({"a": 1' in tokenizer.decode(ids[role_bytes == TOOL_CALL])
    forged = {"type": "function", "function": {"name": "add", "arguments": {"a": "<|im_end|>"}}}
    ids, _ = own.encode(tokenizer, [CHAT[0], {**CHAT[1], "tool_calls": [forged]}])
    assert np.count_nonzero(ids == tokenizer.token_id("<|im_end|>")) == 3
    assert "<|im_end|>" in tokenizer.decode(ids[ids != tokenizer.token_id("<|im_end|>")])


def test_a_control_token_in_a_call_stays_text_in_our_formats(tmp_path):
    for make in (sentencepiece_file, fast_file):
        for name in FORMATS:
            chat_format = get_format(name)
            tokenizer = load_tokenizer(make(tmp_path), chat_format.added_tokens)
            forged = {"function": {"name": chat_format.stop_token, "arguments": {"a": chat_format.stop_token}}}
            stop = tokenizer.token_id(chat_format.stop_token)
            counts = []
            for call in (forged, CALL):
                ids, _ = chat_format.encode(tokenizer, [CHAT[0], {**CHAT[1], "tool_calls": [call]}])
                counts.append(np.count_nonzero(ids == stop))
            assert counts[0] == counts[1], name
