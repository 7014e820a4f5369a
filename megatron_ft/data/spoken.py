"""What an assistant's turn consists of: its answer, its reasoning, empty reasoning, and calls of tools, each with a role of its own.

Reasoning is what stands between a pair of tags of that name, the white space behind it included, since a prompt may end there. Calls are
what stands between tags, or what a template wrote of a message's "tool_calls".
"""

import re
from collections.abc import Iterable, Sequence
from itertools import groupby

from megatron_ft.data.roles import ASSISTANT, EMPTY_REASONING, REASONING, TOOL_CALL
from megatron_ft.data.traced import CALL, REASON

_REASONING = re.compile(
    r"(?:<(?P<tag>think|thinking|thought|reasoning)>(?P<a>.*?)</(?P=tag)>|\[THINK\](?P<b>.*?)\[/THINK\]"
    r"|<\|START_THINKING\|>(?P<c>.*?)<\|END_THINKING\|>)\s*",
    re.DOTALL,
)
_CALLED = re.compile(r"<tool_call>.*?</tool_call>(?:\s*<tool_call>.*?</tool_call>)*", re.DOTALL)
_OPENS = re.compile("tool|call|python|action", re.IGNORECASE)


def holds_parts(text: str) -> bool:
    """Return False for a text that is nothing but an answer."""
    return (
        "<think" in text
        or "<tool_call>" in text
        or "<thought>" in text
        or "<reasoning>" in text
        or "[THINK]" in text
        or "<|START_THINKING|>" in text
    )


def segments(text: str, role: int = ASSISTANT) -> list[tuple[int, str]]:
    """(role, text) of the stretches of what an assistant says."""
    if role != ASSISTANT or not holds_parts(text):
        return [(role, text)]
    return _stretches(text, _roles(text))


def turn_roles(text: str, kinds: Sequence[int], literal: Sequence[bool], control: re.Pattern[str]) -> bytearray:
    """Return the role of each character of an assistant's turn as a template wrote it.

    kinds: of traced.py. literal: whether it is the template's own. control: finds control tokens.
    """
    roles = _roles(text)
    for i, kind in enumerate(kinds):
        if kind == REASON and roles[i] == ASSISTANT:
            roles[i] = REASONING
    if CALL in kinds:
        _mark_calls(text, kinds, literal, control, roles)
    return roles


def _roles(text: str) -> bytearray:
    roles = bytearray([ASSISTANT]) * len(text)
    for found in _CALLED.finditer(text):
        roles[slice(*found.span())] = bytearray([TOOL_CALL]) * len(found[0])
    for found in _REASONING.finditer(text):
        thought = found["a"] or found["b"] or found["c"] or ""
        roles[slice(*found.span())] = bytearray([REASONING if thought.strip() else EMPTY_REASONING]) * len(found[0])
    return roles


def _mark_calls(
    text: str, kinds: Sequence[int], literal: Sequence[bool], control: re.Pattern[str], roles: bytearray
) -> None:
    """Mark tool calls, with the template's text around them up to control tokens, and control tokens that open or close them."""
    controls = [found.span() for found in control.finditer(text) if all(literal[slice(*found.span())])]
    bounds = [0, *(place for span in controls for place in span), len(text)]
    for start, stop in zip(bounds[::2], bounds[1::2], strict=True):
        called = [i for i in range(start, stop) if kinds[i] == CALL and roles[i] == ASSISTANT and not text[i].isspace()]
        if called:
            first, last = _reach(text, literal, controls, (called[0], called[-1] + 1), (start, stop))
            roles[first:last] = bytearray([TOOL_CALL]) * (last - first)


def _reach(
    text: str,
    literal: Sequence[bool],
    controls: Sequence[tuple[int, int]],
    call: tuple[int, int],
    zone: tuple[int, int],
) -> tuple[int, int]:
    """Return the start and end of a call. The header before it ends with a newline."""
    first, last = call
    while first > zone[0] and literal[first - 1] and text[first - 1] != "\n":
        first -= 1
    while last < zone[1] and literal[last]:
        last += 1
    first += len(text[first:last]) - len(text[first:last].lstrip())
    last -= len(text[first:last]) - len(text[first:last].rstrip())
    for a, b in reversed(controls):
        first = a if _OPENS.search(text[a:b]) and not text[b:first].strip() and b <= first else first
    for a, b in controls:
        last = b if _OPENS.search(text[a:b]) and not text[last:a].strip() and a >= last else last
    return first, last


def _stretches(text: str, roles: Iterable[int]) -> list[tuple[int, str]]:
    result, at = [], 0
    for role, same in groupby(roles):
        length = sum(1 for _ in same)
        result.append((role, text[at : at + length]))
        at += length
    return result
