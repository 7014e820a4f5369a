"""A chat as the samples in which each answer stands as a model is to give it: mostly one, the chat itself.

Some templates write earlier turns differently once later ones follow: Qwen3's drops their reasoning, Mistral's puts the system message
into the last question. Then an answer is trained on in the sample that ends with it, or in a later one that begins in the same way.
"""

import re
from dataclasses import dataclass
from typing import Any

from megatron_ft.data.template_environment import REASONING_KEYS
from megatron_ft.data.template_text import AS_ASKED, ONLY_READ, OURS, Run, TemplateText, cut, text_of
from megatron_ft.data.traced import PLAIN, REASON
from megatron_ft.errors import DataError

THINKS = re.compile(r"<think>\s*$")
_IN_TEXT = re.compile(r"\s*<think>.*</think>", re.DOTALL)
_CALL = {"type": "function", "id": "call00001", "function": {"name": "f", "arguments": {"a": 1}}}
_TOOL = {
    "type": "function",
    "function": {"name": "f", "description": "d", "parameters": {"type": "object", "properties": {}}},
}
_ASKED, _ANSWERED = {"role": "user", "content": "q2"}, {"role": "assistant", "content": "a2"}
PROBES: tuple[list[dict[str, Any]], ...] = tuple(
    [*first, _ASKED, _ANSWERED]
    for first in (
        [{"role": "user", "content": "q1"}, {"role": "assistant", "content": "a1"}],
        [{"role": "system", "content": "s1"}, {"role": "user", "content": "q1"}, {"role": "assistant", "content": "a1"}],
        [{"role": "user", "content": "q1"}, {"role": "assistant", "content": "<think>\nr\n</think>\n\na1"}],
        [{"role": "user", "content": "q1"}, {"role": "assistant", "content": "a1", "reasoning_content": "r"}],
        [{"role": "user", "content": "q1", "documents": [{"title": "t", "text": "d"}]}, {"role": "assistant", "content": "a1"}],
        [{"role": "user", "content": "q1", "tools": [_TOOL]}, {"role": "assistant", "content": "", "tool_calls": [_CALL]},
         {"role": "tool", "content": "1", "tool_call_id": "call00001", "name": "f"}, {"role": "assistant", "content": "a1"}],
    )
)  # fmt: skip
"""Chats of every kind; no template takes all of them."""


def rewrites(template: TemplateText) -> bool:
    """Return whether the template writes some turns differently once others follow."""
    return any(_rewrites(template, probe) for probe in PROBES)


def samples(template: TemplateText, messages: Any, known: bool) -> list[Any]:
    """Return the samples that a chat becomes. known: the template rewrites no turns of ordinary chats."""
    answers = [i for i, message in enumerate(messages) if message.get("role") == "assistant"]
    plain = not any(message.keys() - {"role", "content", *OURS} for message in messages)
    if template.options.rewritten == "one" or not answers or (plain and known):
        return [messages]
    found: list[_Sample] = []
    for answer in reversed(answers):
        _add(found, template, messages, answer)
    whole = len(found) == 1 and found[0].end == len(messages) and len(found[0].trained) == len(answers)
    if whole and not found[0].as_asked:
        return [messages]
    return [_only(messages[: one.end], answers, one) for one in reversed(found)]


@dataclass
class _Sample:
    """The first messages of a chat. trained: answers that are written in it as the model should give them."""

    text: str
    end: int
    trained: set[int]
    as_asked: bool = False


def _add(found: list[_Sample], template: TemplateText, messages: Any, answer: int) -> None:
    """Find the sample in which an answer is trained on; answers come last one first."""
    asked = as_asked(template, messages[: answer + 1])
    if asked is not None:
        found.append(_Sample(text_of(asked), answer + 1, {answer}, True))
        return
    start = template.turns(messages[: answer + 1])
    ways = found or [_Sample(template.render(messages), len(messages), set())]
    holder = next((one for one in ways if one.text.startswith(start)), None) or _Sample(start, answer + 1, set())
    if holder not in found:
        found.append(holder)
    holder.trained.add(answer)


def as_asked(template: TemplateText, messages: Any) -> list[Run] | None:
    """Return the prompt of the last message and this answer, if the template writes the prompt differently in the whole chat: the text
    before the answer, or the beginning of the answer. Else None.
    """
    if len(messages) < 2:
        return None
    asked, before = template.render(messages[:-1], True), template.render(messages[:-1])
    runs, last = template.runs(messages), len(messages) - 1
    if text_of(runs).startswith(asked) or not asked.startswith(before):
        return None
    header = asked[len(before) :]
    turn = [run for run in runs if run.message == last and not run.behind]
    prompt = template.runs(messages[:-1], add_generation_prompt=True)
    prompt = [run if run.message is not None else run._replace(message=last, behind=False) for run in prompt]
    if THINKS.search(header):
        return [*prompt, *thought] if turn and (thought := _thought(messages[-1], turn, header)) else None
    if text_of(runs).startswith(before) or not text_of(turn).startswith(header):
        return None
    return [*cut(prompt, len(before))[0], *turn]


def _thought(message: Any, turn: list[Run], header: str) -> list[Run]:
    """Return an answer with its reasoning, for a prompt whose header begins the reasoning; [] if the message has none, or the template
    writes the answer in another way."""
    content = message.get("content") or ""
    reasoning = next((message[key] for key in REASONING_KEYS if message.get(key)), None)
    written, opened = text_of(turn), THINKS.sub("", header)
    if not written.startswith(opened) or not (reasoning or _IN_TEXT.match(content)):
        return []
    rest, end = cut(turn, len(opened))[1], "\n</think>\n\n"
    if reasoning is None:
        reasoning, _, answer = content.lstrip().removeprefix("<think>").rpartition("</think>")
        space = "" if text_of(rest).startswith(answer) else answer[: len(answer) - len(answer.lstrip())]
        end = "</think>" + (space if answer.strip() else "\n\n")
    own = turn[0]._replace(literal=False, kind=PLAIN)
    return [own._replace(text=reasoning.lstrip("\n"), kind=REASON), own._replace(text=end), *rest]


def _rewrites(template: TemplateText, probe: list[dict[str, Any]]) -> bool:
    answers = [i for i, message in enumerate(probe) if message["role"] == "assistant"]
    try:
        whole = template.render(probe)
        return not all(
            whole.startswith(template.turns(probe[: i + 1])) and as_asked(template, probe[: i + 1]) is None
            for i in answers
        )
    except DataError:
        return False  # it does not take such chats


def _only(messages: Any, answers: list[int], sample: _Sample) -> Any:
    result = [
        {**message, ONLY_READ: True} if i in answers and i not in sample.trained else message
        for i, message in enumerate(messages)
    ]
    return [*result[:-1], {**result[-1], AS_ASKED: True}] if sample.as_asked else result
