"""Writes a chat format as a chat template for transformers (Jinja), tools included.

It uses only what other readers of such templates support: namespace, loops, conditions, `trim` and `tojson`. It needs no tokenizer.
"""

from __future__ import annotations

import json
from typing import Any

from megatron_ft.data.roles import ASSISTANT, CONTEXT, PROMPTER, ROLES, SYSTEM
from megatron_ft.data.tool_text import APART, CALLED, DEFINED, THOUGHT

_OWN = "message['content'] or ''"
MARKS = ("{% generation %}", "{% endgeneration %}")


def template(chat: Any, marks: tuple[str, str] = ("", ""), reasoning: bool = True, contexts: bool = True) -> str:
    """Return a Jinja template for a ChatFormat. marks: around the assistant's turns. reasoning, contexts: False for the forms of earlier
    releases, which had none, or refused a context where the format has no turn for it.
    """
    folds = contexts and chat.context is not None
    state = ", said='', waiting='', alone='', moved=false" if folds else ""
    turns = _text(chat, reasoning) + (_folded(chat, marks) if folds else _turns(chat, marks))
    return (
        f"{{% set ns = namespace(text='', tools='', inserted=false{state}) %}}" + _tools() + _start(chat)
        + "{% for message in messages %}" + turns + "{% endfor %}"
        + ("{% if ns.alone %}{{ raise_exception('the chat ends with context') }}{% endif %}" if folds else "")
        + f"{{% if add_generation_prompt %}}{{{{ {_quoted(chat.generation_prompt)} }}}}{{% endif %}}"
    )  # fmt: skip


def _tools() -> str:
    """Return code that sets ns.tools to the definitions, as tool_text.definitions."""
    first, last = map(_quoted, DEFINED)
    each = "{% for tool in tools %}{% set ns.tools = ns.tools + " + _quoted("\n") + " + (tool | tojson) %}{% endfor %}"
    return f"{{% if tools %}}{{% set ns.tools = {first} %}}{each}{{% set ns.tools = ns.tools + {last} %}}{{% endif %}}"


def _start(chat: Any) -> str:
    """Return the text before the first message."""
    begin = f"{{{{ {_quoted(chat.begin)} }}}}" if chat.begin else ""
    if SYSTEM not in chat.turns:
        return begin
    missing = "not messages or messages[0]['role'] != 'system'"
    if chat.default_system is None:
        condition, text = f"ns.tools and ({missing})", "ns.tools"
    else:
        text = f"({_quoted(chat.default_system)} + ({_quoted(APART)} + ns.tools if ns.tools else ''))"
        condition = missing
    turn = _written(chat.turns[SYSTEM], text)
    return f"{begin}{{% if {condition} %}}{{% set ns.inserted = true %}}{turn}{{% endif %}}"


def _text(chat: Any, reasoning: bool) -> str:
    """Return code that sets ns.text to the text of a message, as tool_text.as_text."""
    own = _OWN
    call_parts = [_quoted(CALLED[0]), "(f['name'] | tojson)", _quoted(CALLED[1])]
    call_parts += ["(a if a is string else (a | tojson))", _quoted(CALLED[2])]
    call = f"ns.text + ({_quoted(chr(10))} if ns.text else '') + {' + '.join(call_parts)}"
    thought = f"{_quoted(THOUGHT[0])} + message['reasoning_content'] + {_quoted(THOUGHT[1])} + ns.text"
    thought = f"({thought}) | trim" if chat.strip else thought
    if_any = "{% if message['reasoning_content'] and message['role'] == 'assistant' %}"
    if_any += f"{{% set ns.text = {thought} %}}{{% endif %}}"
    return (
        f"{{% set ns.text = {f'({own}) | trim' if chat.strip else own} %}}"
        + (if_any if reasoning else "")
        + "{% for call in message['tool_calls'] or [] %}{% set f = call['function'] or call %}"
        f"{{% set a = f['arguments'] or {{}} %}}{{% set ns.text = {call} %}}{{% endfor %}}"
        "{% if loop.first and ns.tools and message['role'] == 'system' %}"
        f"{{% set ns.text = ns.text + ({_quoted(APART)} if ns.text else '') + ns.tools %}}{{% endif %}}"
    )


def _folded(chat: Any, marks: tuple[str, str]) -> str:
    """Return code that writes the turns of a format that has none for contexts: they become part of a question, as ChatFormat._folded.

    ns.waiting has the blocks of contexts before it, ns.alone the same as questions of their own, ns.said the role before.
    """
    trimmed = " | trim" if chat.strip else ""
    before, after = map(_quoted, chat.context.split("{text}"))
    before = before.replace("{context}", '" + ns.waiting + "')
    own = f"(({_OWN}){trimmed})"
    own = _either(chat, PROMPTER, "('user' if ns.alone else ns.said)", own)
    return (
        f"{{% if message['role'] in {_names(CONTEXT)} %}}{{% if not ns.moved %}}{_appended(chat, 'ns.waiting', 'ns.alone')}"
        f"{{% set ns.alone = ns.alone + {own} %}}{{% endif %}}"
        f"{{% else %}}{{% set ns.moved = false %}}{{% if message['role'] in {_names(PROMPTER)} %}}{_ahead(chat)}"
        f"{{% if ns.alone or ns.moved %}}{{% set ns.text = ({before} + ({_OWN}) + {after}){trimmed} %}}{{% endif %}}"
        "{% elif ns.alone %}{{ ns.alone }}{% set ns.said = 'user' %}{% endif %}"
        "{% set ns.waiting = '' %}{% set ns.alone = '' %}"
        + _turns(chat, marks, folds=True)
        + "{% set ns.said = message['role'] %}{% endif %}"
    )


def _ahead(chat: Any) -> str:
    """Return code that adds contexts between a question and its answer to ns.waiting, and sets ns.moved."""
    return (
        "{% set ahead = namespace(text='', any=false, open=true) %}{% for message in messages[loop.index:] %}{% if ahead.open %}"
        f"{{% if message['role'] == 'context' %}}{_appended(chat, 'ahead.text', 'ahead.any')}{{% set ahead.any = true %}}"
        "{% else %}{% set ahead.open = false %}{% set ns.moved = ahead.any and message['role'] == 'assistant' %}{% endif %}"
        "{% endif %}{% endfor %}{% if ns.moved %}"
        f"{{% set ns.waiting = ns.waiting + ({_quoted(chr(10))} if ns.alone else '') + ahead.text %}}{{% endif %}}"
    )


def _appended(chat: Any, place: str, more: str) -> str:
    """Return code that appends the block of a context to the text in a place. more: whether there is one before it."""
    first, last = map(_quoted, chat.block.split("{context}"))
    line = f"({_quoted(chr(10))} if {more} else '')"
    return f"{{% set {place} = {place} + {line} + {first} + ({_OWN}) + {last} %}}"


def _turns(chat: Any, marks: tuple[str, str], folds: bool = False) -> str:
    """Return code that writes the turn of ns.text by the role of the message. folds: the role before it is in ns.said."""
    turns = ""
    for role, turn in chat.turns.items():
        said = f"{{{{ {_either(chat, role, 'ns.said')} }}}}" if folds else _turn(chat, role, turn)
        said = said.join(marks) if role == ASSISTANT else said
        turns += f"{{% {'elif' if turns else 'if'} message['role'] in {_names(role)} %}}{said}"
    return turns + "{% else %}{{ raise_exception('unknown role: ' + message['role']) }}{% endif %}"


def _either(chat: Any, role: int, previous: str, value: str = "ns.text") -> str:
    """Return an expression for a turn after the role `previous`, which is empty before the first message."""
    plain = _joined(chat.turns[role], value)
    for (later, earlier), variant in chat.after.items():
        if later == role:
            first = f" or (not {previous} and ns.inserted)" if earlier == SYSTEM else ""
            return f"({_joined(variant, value)} if {previous} in {_names(earlier)}{first} else {plain})"
    return plain


def _turn(chat: Any, role: int, turn: str) -> str:
    for (later, earlier), variant in chat.after.items():
        if later == role:
            before = f"(loop.index0 > 0 and messages[loop.index0 - 1]['role'] in {_names(earlier)})"
            before += " or (loop.first and ns.inserted)" if earlier == SYSTEM else ""
            return f"{{% if {before} %}}{_written(variant)}{{% else %}}{_written(turn)}{{% endif %}}"
    return _written(turn)


def _written(turn: str, value: str = "ns.text") -> str:
    return f"{{{{ {_joined(turn, value)} }}}}"


def _joined(turn: str, value: str) -> str:
    before, after = map(_quoted, turn.split("{text}"))
    return f"{before} + {value} + {after}"


def _names(role: int) -> list[str]:
    return [name for name, number in ROLES.items() if number == role]


def _quoted(text: str) -> str:
    return json.dumps(text, ensure_ascii=False)
