"""What an assistant's turn consists of: its answer, its reasoning, empty reasoning, and calls of tools, each with a role of its own.

Reasoning is what stands between a pair of tags of that name, the white space behind it included, since a prompt may end there. Calls are
what stands between tags and looks like one, or what a template wrote of a message's "tool_calls". Where a record says what is reasoning
and what is a call, tags inside of these do not end them.
"""

import re
from collections.abc import Iterable, Iterator, Sequence
from itertools import groupby

from megatron_ft.data.roles import ASSISTANT, EMPTY_REASONING, REASONING, TOOL_CALL
from megatron_ft.data.traced import CALL, PLAIN, REASON

_REASONING = re.compile(
    r"(?:<(?P<tag>think|thinking|thought|reasoning)>(?P<a>.*?)</(?P=tag)>|\[THINK\](?P<b>.*?)\[/THINK\]"
    r"|<\|START_THINKING\|>(?P<c>.*?)<\|END_THINKING\|>)\s*",
    re.DOTALL,
)
DELIMITERS = (
    *(f"<{slash}{name}>" for name in ("think", "thinking", "thought", "reasoning", "tool_call") for slash in ("", "/")),
    *("[THINK]", "[/THINK]", "<|START_THINKING|>", "<|END_THINKING|>"),
)
"""Tags around reasoning and calls. Where they are special tokens, an assistant's text means these by them."""
_CALLED = re.compile(r"<tool_call>(?P<call>.*?)</tool_call>", re.DOTALL)
_CALL = re.compile(r"\s*[{\[<]|\n*[\w.-]+\s*(?:<arg_key>|\(|$)")  # JSON, tags of a function, a name and arguments
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
    roles = _roles(text, _plain(text, kinds))
    for i, kind in enumerate(kinds):
        if kind == REASON and roles[i] == ASSISTANT:
            roles[i] = REASONING
    if CALL in kinds:
        _mark_calls(text, kinds, literal, control, roles)
    return roles


def delimiters(text: str, kinds: Sequence[int]) -> Iterator[tuple[int, int]]:
    """Yield where the tags stand that delimit reasoning and calls in a text."""
    plain = _plain(text, kinds)
    for found in (*_CALLED.finditer(plain), *_REASONING.finditer(plain)):
        inner = next(name for name, value in found.groupdict().items() if name != "tag" and value is not None)
        start, stop = found.span(inner)
        if inner != "call" or _CALL.match(text[start:stop]):
            yield from ((found.start(), start), (stop, stop + len(found[0][stop - found.start() :].rstrip())))


_OPEN, _CLOSE = ("|".join(map(re.escape, DELIMITERS[first::2])) for first in (0, 1))
_EDGES = re.compile(
    rf"(\A(?:{_OPEN})|(?:{_CLOSE})(?=\s*\Z)|</tool_call>(?=\s*<tool_call>)|(?<=</tool_call>\n)<tool_call>)"
)


def edges(role: int, text: str) -> list[str]:
    """Return a stretch of reasoning or calls, cut at the tags around it, which are the parts of odd number."""
    return _EDGES.split(text) if role in (REASONING, EMPTY_REASONING, TOOL_CALL) else [text]


def _plain(text: str, kinds: Sequence[int]) -> str:
    """Return the text with an x for each character that a record calls reasoning or a call."""
    return "".join("x" if k != PLAIN and not c.isspace() else c for c, k in zip(text, kinds, strict=True))


def joined(pieces: Iterable[tuple[int, str]]) -> list[tuple[int, str]]:
    """Return stretches of known roles such that white space belongs to the reasoning before it, and to the calls around it."""
    text, roles = "", bytearray()
    for role, piece in pieces:
        text, roles = text + piece, roles + bytearray([role]) * len(piece)
    for space in re.finditer(r"\s+", text):
        start, stop = space.span()
        before, after = (roles[i] if 0 <= i < len(text) else None for i in (start - 1, stop))
        if before in (REASONING, EMPTY_REASONING) or before == after == TOOL_CALL:
            roles[start:stop] = bytearray([before]) * (stop - start)
    return _stretches(text, roles)


def reasoning_role(text: str) -> int:
    return REASONING if text.strip() else EMPTY_REASONING


def _roles(text: str, plain: str | None = None) -> bytearray:
    """Return the role of each character. plain: the text with an x for each character whose part is known."""
    plain = text if plain is None else plain
    roles, end = bytearray([ASSISTANT]) * len(text), None
    for found in _CALLED.finditer(plain):
        start, stop = found.span()
        if _CALL.match(text[slice(*found.span("call"))]):
            start = end if end is not None and not text[end:start].strip() else start
            roles[start:stop] = bytearray([TOOL_CALL]) * (stop - start)
            end = stop
    for found in _REASONING.finditer(plain):
        thought = found["a"] or found["b"] or found["c"] or ""
        roles[slice(*found.span())] = bytearray([reasoning_role(thought)]) * len(found[0])
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
