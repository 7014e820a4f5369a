"""Whether what a template wrote holds all that a chat says: many leave out, without a word, what they have no place for.

Each message must be somewhere, and of an answer every part: its text, its reasoning and its calls. White space is not compared, nor the
tags around reasoning, which templates write in their own way.
"""

import json
import re
from collections import defaultdict
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from megatron_ft.data.template_environment import REASONING_KEYS
from megatron_ft.data.template_samples import PROBES, THINKS
from megatron_ft.data.template_text import ONLY_READ, REMEDY, Run, TemplateText, text_of
from megatron_ft.data.traced import CALL, FORGED
from megatron_ft.errors import DataError

REASONING, NAME, TOOLS, DOCUMENTS = "reasoning_content", "name", "tools", "documents"
Places = frozenset[str]
_TAGS = re.compile(r"</?(?:think|thinking|thought|reasoning)>|\[/?THINK\]|<\|(?:START|END)_THINKING\|>")
_THOUGHT = re.compile(r".*(?:</(?:think|thinking|thought|reasoning)>|\[/THINK\]|<\|END_THINKING\|>)", re.DOTALL)
_MARK = "\ue0fe"  # a character for private use
_SHOWN = 40


def check_complete(
    template: TemplateText,
    messages: Any,
    written: Sequence[tuple[Any, Sequence[Run]]],
    known: Places,
    prompt: bool = False,
) -> None:
    """Raise DataError for a message, or a part of an answer, that the template left out. written: (messages, runs) of each sample.
    prompt: earlier answers need not be whole.
    """
    turns: dict[int, list[Run]] = defaultdict(list)
    for sample, runs in written:
        for run in runs:
            if run.message is not None and not sample[run.message].get(ONLY_READ):
                turns[run.message].append(run)
    for number, message in enumerate(messages):
        whole = message.get("role") == "assistant" and not prompt
        lost = (_lost if whole else _absent)(template, messages, number, turns[number], known)
        if lost is not None:
            part = f"or changes '{' '.join(lost.split())[:_SHOWN]}' of " if whole else ""
            raise DataError(
                f"the tokenizer's chat template leaves out {part}message {number + 1}, of the role {message['role']}; "
                f"leave the chat out, or {REMEDY}"
            )


def places(template: TemplateText) -> Places:
    """Return for which of name, reasoning_content, tools and documents the template has a place."""
    found = {
        key for key in (REASONING, NAME, TOOLS, DOCUMENTS) if any(_has_place(template, probe, key) for probe in PROBES)
    }
    begins = THINKS.search(_rendered(template, PROBES[0][:1], True))
    return frozenset(found | {REASONING} if begins else found)


def has_effect(template: TemplateText, key: str) -> bool:
    """Whether the template takes notice of a key of messages."""
    return any(
        _rendered(template, [{**message, key: value} for message in probe]) != _rendered(template, probe)
        for probe in PROBES
        for value in (_MARK, True)
    )


def _has_place(template: TemplateText, probe: Any, key: str) -> bool:
    tool = {"type": "function", "function": {"name": _MARK, "description": _MARK, "parameters": {}}}
    values: dict[str, Any] = {TOOLS: [tool], DOCUMENTS: [{"title": _MARK, "text": _MARK}]}
    value = values.get(key, _MARK)
    changed = [
        {**message, key: value} if key == NAME or (message["role"] == "assistant") == (key == REASONING) else message
        for message in probe
    ]
    ends = [i + 1 for i, message in enumerate(probe) if message["role"] == "assistant"]
    return any(_MARK in _rendered(template, changed[:end]) for end in ends)


def _absent(template: TemplateText, messages: Any, number: int, turn: list[Run], known: Places) -> str | None:
    """Return the text of a message of which nothing was written."""
    content = messages[number].get("content")
    if not isinstance(content, str) or not content.strip() or any(_is_said(run) for run in turn):
        return None
    return None if _writes(template, messages, number) else content


def _lost(template: TemplateText, messages: Any, number: int, turn: list[Run], known: Places) -> str | None:
    """Return the first part of an answer that was not written."""
    message, said = messages[number], text_of([run for run in turn if _is_said(run) and run.kind != CALL])
    reasoning = next((message[key] for key in REASONING_KEYS if message.get(key)), "")
    must_reason = REASONING in known and template.options.rewritten != "one"
    if must_reason and reasoning.strip() not in said and _bare(reasoning) not in _bare(said):
        return str(reasoning)
    if (lost := _lost_text(message.get("content") or "", said, template.options.rewritten == "one")) is not None:
        labelled = bool(said) or _writes(template, messages, number)
        if not _holds(_bare(said), message["content"]) and not (
            labelled and _bare(message["content"]) in _bare(text_of(turn))
        ):
            return lost
    calls = message.get("tool_calls") or []
    if calls and not any(run.kind == CALL for run in turn):
        return json.dumps(calls[0].get("function") or calls[0], ensure_ascii=False)
    called = text_of([run for run in turn if _is_said(run) and run.kind == CALL])
    return _lost_call(calls, called, text_of(turn))


def _lost_text(content: str, said: str, without_reasoning: bool) -> str | None:
    if content.strip() in said:
        return None
    bare, at = _bare(said), 0
    for part in _TAGS.split(_THOUGHT.sub("", content) if without_reasoning else content):
        found = bare.find(_bare(part), at)
        if found < 0:
            return part
        at = found + len(_bare(part))
    return None


def _lost_call(calls: Sequence[Mapping[str, Any]], called: str, turn: str) -> str | None:
    called, turn = _bare(called), _bare(turn)
    for function in (call.get("function") or call for call in calls):
        if not _holds(called, function["name"]):
            return str(function["name"])
        lost = next((text for text in _texts(function.get("arguments")) if not _holds(turn, text)), None)
        if lost is not None:
            return lost
    return None


def _holds(bare: str, text: str) -> bool:
    """Whether a text is there, as it is or as JSON has it."""
    return _bare(text) in bare or any(
        _bare(json.dumps(text, ensure_ascii=ascii)[1:-1]) in bare for ascii in (False, True)
    )


def _texts(value: Any) -> Iterator[str]:
    """All texts in the arguments of a call."""
    if isinstance(value, str):
        yield value
    for item in value if isinstance(value, list) else []:
        yield from _texts(item)
    for key, item in value.items() if isinstance(value, dict) else []:
        yield key
        yield from _texts(item)


def _writes(template: TemplateText, messages: Any, number: int) -> bool:
    """Whether the text of a message has an effect on what the template writes; for texts that lost their labels there."""
    message = messages[number]
    changed = [*messages[:number], {**message, "content": message["content"] + _MARK}, *messages[number + 1 :]]
    prompts = template.options.rewritten != "one"
    return _MARK in _rendered(template, changed) or (prompts and _MARK in _rendered(template, changed[:-1], True))


def _rendered(template: TemplateText, messages: Any, prompt: bool = False) -> str:
    """Return what is rendered of a chat; nothing of one that the template refuses."""
    try:
        return template.render(messages, prompt)
    except DataError:
        return ""


def _is_said(run: Run) -> bool:
    """Whether a text has the label of a message."""
    return not run.literal and run.kind != FORGED


def _bare(text: str) -> str:
    return "".join(text.split())
