"""Puts {% generation %} into a chat template, around what the assistant says, so that others train on the same tokens.

Tried is each place that may be the right one; kept is the first by which the template writes the same text and marks what roles say, on
chats of every kind that the template takes. Where none is, the template stays as it is.
"""

import re
from collections.abc import Iterator
from typing import Any

from megatron_ft.data.template_files import DEFAULT
from megatron_ft.data.template_samples import PROBES
from megatron_ft.data.template_text import Run, TemplateText
from megatron_ft.errors import DataError, TokenizerError
from megatron_ft.log import logger

log = logger("data.template")
_TAG = re.compile(r"\{#.*?#\}|\{\{.*?\}\}|(\{%[-+]?)\s*(\w+)(.*?)(-?%\})", re.DOTALL)
_OPENS = ("for", "if", "macro", "call", "filter")


def with_marks(source: str, template: TemplateText) -> str:
    """Return the source with marks, or unchanged if no place for them is found."""
    if template.has_marks:
        return source
    if (found := next((one for one in _candidates(source) if _is_right(one, source, template)), None)) is not None:
        return found
    log.warning(
        "the tokenizer's chat template is exported without {% generation %}: no place for it marks just what the assistant says"
    )
    return source


def _is_right(marked: str, source: str, template: TemplateText) -> bool:
    """Whether the marked template writes the same and marks the assistant's turns."""
    before, after = (
        TemplateText({DEFAULT: one}, template.tokens, template.specials, template.options) for one in (source, marked)
    )
    compared = 0
    for probe in PROBES:
        try:
            expected = before.runs(probe)
        except DataError:
            continue  # it does not take such chats
        try:
            if _trained(after.runs(probe)) != [
                (character, _says(probe, run)) for run in expected for character in run.text
            ]:
                return False
        except (DataError, TokenizerError):
            return False
        compared += 1
    return compared > 0


def _trained(runs: list[Run]) -> list[tuple[str, bool]]:
    return [(character, run.trained) for run in runs for character in run.text]


def _says(probe: list[dict[str, Any]], run: Run) -> bool:
    return probe[run.message or 0]["role"] == "assistant" and not run.behind


def _candidates(source: str) -> Iterator[str]:
    """Marks around a branch for the assistant, else around a whole round of a loop, if it is the assistant's."""
    blocks = list(_blocks(source))
    for kind, start, stop, opening, closing in blocks:
        if kind != "for" and re.search(r"assistant", opening):
            yield _marked(source, start, stop, opening, closing)
    branches = [block for block in blocks if block[0] != "for" and "assistant" in block[3]]
    if len(branches) > 1:
        text = source
        for _, start, stop, opening, closing in sorted(branches, key=lambda block: -block[1]):
            text = _marked(text, start, stop, opening, closing)
        yield text
    for kind, start, stop, opening, closing in blocks:
        target = re.match(r"\s*(\w+)\s+in\b", opening) if kind == "for" else None
        if target:
            yield _round(source, start, stop, target[1], opening, closing)


def _marked(source: str, start: int, stop: int, opening: str, closing: str) -> str:
    begin = "{% generation -%}" if opening.endswith("-%}") else "{% generation %}"
    end = "{%- endgeneration %}" if closing.startswith("{%-") else "{% endgeneration %}"
    return source[:start] + begin + source[start:stop] + end + source[stop:]


def _round(source: str, start: int, stop: int, name: str, opening: str, closing: str) -> str:
    """Return the source with the body of a loop twice: with marks for the assistant, without for other roles."""
    dash, back = ("-" if opening.endswith("-%}") else ""), ("-" if closing.startswith("{%-") else "")
    body = source[start:stop]
    test = f"{{% if {name}['role'] == 'assistant' %}}{{% generation {dash}%}}"
    rest = f"{{%{back} endgeneration %}}{{% else {dash}%}}{body}{{%{back} endif %}}"
    return source[:start] + test + body + rest + source[stop:]


def _blocks(source: str) -> Iterator[tuple[str, int, int, str, str]]:
    """(kind, where its body starts, where it ends, rest of the opening tag, closing tag) of each loop and each branch."""
    stack: list[tuple[str, int, str]] = []
    for tag in _TAG.finditer(source):
        word = tag[2]
        if word is None:
            continue
        if word in ("elif", "else", "endfor", "endif", "endmacro", "endcall", "endfilter") and stack:
            kind, start, opening = stack.pop()
            yield kind, start, tag.start(), opening, tag[0]
        if word in (*_OPENS, "elif", "else"):
            stack.append((word, tag.end(), tag[3] + tag[4]))
