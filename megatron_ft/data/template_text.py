"""What a chat template writes of a chat: the text that transformers renders, cut by messages.

A chat is rendered by an environment that tells of each character whose text it is and in whose turn the template wrote it
(template_environment.py). The template's own text belongs to the message that follows in its turn, after the last one to that. The
text is compared with what the template gives without labels. Knows no tokenizer and no roles.
"""

import json
import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from itertools import groupby
from typing import Any, NamedTuple

from megatron_ft.data.roles import ROLES
from megatron_ft.data.spoken import DELIMITERS
from megatron_ft.data.template_environment import (
    FAULTS,
    Marked,
    as_passed,
    compile_template,
    compile_traced,
    marked,
    marked_definitions,
)
from megatron_ft.data.template_files import DEFAULT, TOOLS
from megatron_ft.data.template_options import TemplateOptions
from megatron_ft.data.traced import FORGED, Label, Traced, joined, labelled, runs_of, written
from megatron_ft.errors import DataError, TokenizerError

_OURS = {
    re.compile(rf"(?:{re.escape(kind.__module__)}\.)?\b{kind.__name__}\b"): name
    for kind, name in ((Traced, "str"), (Marked, "dict"))
} | {re.compile("'NoneType' object"): "a missing value", re.compile("NoneType"): "missing value"}
"""Our kinds of str and dict, and Python's word for nothing, in the words of its errors and Jinja's."""

REMEDY = "choose another --chat_format"
NAMES = {"prompter": "user"}  # what templates call our speakers
ONLY_READ = "only_read"  # key of an answer that is not trained on in this sample
OTHER = "other"  # key of what else a message says in its file
AS_ASKED = "as_asked"  # key of an answer before which the chat stands as in its prompt
OURS = (
    "mark_bits",
    "weight",
    "tools",
    "documents",
    ONLY_READ,
    AS_ASKED,
    OTHER,
)  # keys of messages that are not the template's business
_START, _END = "\ue0fc", "\ue0fd"  # around a text, to find it again
_WRAPPED = re.compile(f"{_START}([0-9]+){_START}(.*?){_END}", re.DOTALL)
_BREAK = "\ue0ff"  # a character for private use, which keeps control tokens in messages from being one


class Run(NamedTuple):
    """A stretch of what a template wrote. message: the number of the one it belongs to, None for the start of an answer to come.
    literal: the template's own. trained: inside of {% generation %}. behind: after the last turn, in none. ahead: before the first."""

    text: str
    message: int | None
    kind: int
    literal: bool
    trained: bool
    behind: bool = False
    ahead: bool = False


def text_of(runs: Sequence[Run]) -> str:
    return "".join(run.text for run in runs)


@dataclass
class TemplateText:
    """sources: Jinja by name. tokens: variables such as bos_token. specials: control tokens."""

    sources: Mapping[str, str]
    tokens: Mapping[str, str]
    specials: Sequence[str]
    options: TemplateOptions = field(default_factory=TemplateOptions)
    _compiled: dict[tuple[str, bool], Any] = field(default_factory=dict)

    def source(self, tools: Any) -> str:
        """Return the template for a chat, chosen as transformers does."""
        name = TOOLS if tools is not None and TOOLS in self.sources else DEFAULT
        if name not in self.sources:
            raise TokenizerError(
                f"the tokenizer's chat templates are {', '.join(self.sources)}, none is default; {REMEDY}"
            )
        return self.sources[name]

    def render(self, messages: Any, add_generation_prompt: bool = False) -> str:
        """Return the text that transformers renders."""
        return self._run(False, *_passed(messages), add_generation_prompt)

    def runs(self, messages: Any, add_generation_prompt: bool = False) -> list[Run]:
        """Return the template's text, split by messages. Raise DataError if it refuses the chat or cannot be followed."""
        passed = _passed(messages)
        forged = next(self._forged(passed), None)
        if forged:
            passed = ([_broken(one, self._of(one)) for one in passed[0]], *_broken(passed[1:], self.control))
        chat, tools, documents = passed
        beside = marked_definitions(tools), marked_definitions(documents)
        runs = self._labelled_runs(chat, *beside, add_generation_prompt)
        if forged:
            runs = [part for run in runs for part in _mended(run)]
        whole = self.render(messages, add_generation_prompt)
        if text_of(runs) != whole:
            reason = (
                f"decides by the special token '{forged[0]}' in it"
                if forged
                else "writes it in a way that roles cannot follow"
            )
            raise DataError(f"the tokenizer's chat template {reason}; leave the chat out, or {REMEDY}")
        if add_generation_prompt and whole.startswith(before := self.render(messages)):
            known, begun = cut(runs, len(before))  # an answer that does not exist yet
            runs = known + [run._replace(message=None, literal=True) for run in begun]
        return [run for run in runs if run.text]

    def _forged(self, passed: tuple[list[dict[str, Any]], Any, Any]) -> Iterator[re.Match[str]]:
        """Yield special tokens that the texts of a chat spell."""
        for one, pattern in (*((message, self._of(message)) for message in passed[0]), (passed[1:], self.control)):
            if found := pattern.search(json.dumps(one, ensure_ascii=False, default=str)):
                yield found

    def _of(self, message: Mapping[str, Any]) -> re.Pattern[str]:
        """Return what finds the special tokens that a message may not spell; an assistant delimits its reasoning and calls by some."""
        return self._forgeable if message.get("role") == "assistant" else self.control

    def _labelled_runs(
        self, chat: list[dict[str, Any]], tools: Any, documents: Any, add_generation_prompt: bool
    ) -> list[Run]:
        """Return the runs of a chat. Where a text has lost its labels, as in `'%s' % text`, it is looked for between two marks."""
        runs = _by_message(self._run(True, marked(chat), tools, documents, add_generation_prompt))
        said = {run.message for run in runs if not run.literal}
        lost = [i for i, message in enumerate(chat) if i not in said and str(message.get("content") or "").strip()]
        if not lost:
            return runs
        try:
            text = self._run(True, marked(_wrapped(chat, lost)), tools, documents, add_generation_prompt)
        except DataError:
            return runs  # it decides by what a text begins with
        found = _by_message(_unwrapped(text))
        return found if text_of(found) == text_of(runs) else runs

    def turns(self, messages: Any) -> str:
        """Return the template's text up to the end of the last turn."""
        return text_of([run for run in self.runs(messages) if not run.behind])

    @cached_property
    def has_marks(self) -> bool:
        return any(re.search(r"\{%[-+]?\s*generation\s*-?%\}", source) for source in self.sources.values())

    @cached_property
    def control(self) -> re.Pattern[str]:
        return _any_of(self.specials)

    @cached_property
    def _forgeable(self) -> re.Pattern[str]:
        return _any_of(set(self.specials) - set(DELIMITERS))

    def _run(self, traced: bool, messages: Any, tools: Any, documents: Any, add_generation_prompt: bool) -> str:
        variables = {
            **self.tokens, **self.options.arguments, "messages": messages, "tools": tools, "documents": documents,
            "add_generation_prompt": add_generation_prompt,
        }  # fmt: skip
        template = self._template(self.source(tools), traced)
        try:
            pieces = template.root_render_func(template.new_context(variables))
            return written(pieces) if traced else "".join(pieces)
        except FAULTS as error:
            reason = " ".join(str(error).split())
            for word, usual in _OURS.items():
                reason = word.sub(usual, reason)
            raise DataError(f"the tokenizer's chat template refuses this chat ({reason}); see --role_order") from error
        except RecursionError as error:
            raise DataError("the tokenizer's chat template nests too deeply on this chat; leave it out") from error

    def _template(self, source: str, traced: bool) -> Any:
        if (source, traced) not in self._compiled:
            compiled = compile_traced if traced else compile_template
            self._compiled[source, traced] = compiled(source, self.options.now)
        return self._compiled[source, traced]


def _any_of(names: Iterable[str]) -> re.Pattern[str]:
    return re.compile("|".join(map(re.escape, sorted(names, key=len, reverse=True))) or "(?!)")


def _passed(messages: Any) -> tuple[list[dict[str, Any]], Any, Any]:
    """(messages, tools, documents) as a template takes them."""
    unknown = next((message for message in messages if str(message.get("role")) not in ROLES), None)
    if unknown is not None:
        raise DataError(f"unknown role {unknown.get('role')!r}; the roles are {', '.join(ROLES)}")
    tools, documents = (
        next((message[key] for message in messages if message.get(key)), None) for key in ("tools", "documents")
    )
    kept = ({key: value for key, value in message.items() if key not in OURS} for message in messages)
    named = ({**message, "role": NAMES.get(message["role"], message["role"])} for message in kept)
    return as_passed(named), tools, documents


def _by_message(text: str) -> list[Run]:
    """Give the template's own text to messages: in each turn to the message that follows, after the last one to that. Text outside of
    all turns belongs to the message before it, at the start to the first one."""
    runs: list[Run] = []
    stretches = list(_stretches(text))
    turns = any(label.owner is not None for _, label in stretches)
    for owner, turn in groupby(stretches, key=lambda one: one[1].owner):
        parts = list(turn)
        anchors = [label.message for _, label in parts if label.message is not None]
        for part, label in parts:
            message = label.message if label.message is not None else anchors[0] if anchors else owner
            if label.message is not None and len(anchors) > 1:
                anchors = anchors[1:]
            behind = turns and owner is None and not anchors
            runs.append(Run(part, message, label.kind, label.message is None, label.trained, behind))
    before = next((run.message for run in runs if run.message is not None), None)
    started = False
    for i, run in enumerate(runs):
        before = run.message if run.message is not None else before
        started = started or not run.behind
        runs[i] = run._replace(message=before, behind=run.behind and started, ahead=not started)
    return runs


def _stretches(text: str) -> Iterator[tuple[str, Label]]:
    at, plain = 0, "".join((text,))
    for length, label in runs_of(text):
        yield plain[at : at + length], label
        at += length


def cut(runs: Sequence[Run], at: int) -> tuple[list[Run], list[Run]]:
    """Return the runs of the first `at` characters, and those of the others."""
    first, rest = [], []
    for run in runs:
        first.append(run._replace(text=run.text[: max(0, at)]))
        rest.append(run._replace(text=run.text[max(0, at) :]))
        at -= len(run.text)
    return [run for run in first if run.text], [run for run in rest if run.text]


def _wrapped(chat: list[dict[str, Any]], numbers: Sequence[int]) -> list[dict[str, Any]]:
    """Return the messages, of some of them the text between marks that hold the number."""
    result = list(chat)
    for i in numbers:
        content = chat[i]["content"]
        if isinstance(content, str):
            core = content.strip()
            before, _, after = content.partition(core)
            result[i] = {**chat[i], "content": f"{before}{_START}{i}{_START}{core}{_END}{after}"}
    return result


def _unwrapped(text: str) -> str:
    """Return the text without the marks of _wrapped, and with labels on what is between them."""
    parts: list[str] = []
    for part, label in _stretches(text):
        found = _WRAPPED.split(part) if label.message is None else [part]
        for i, piece in enumerate(found):
            if i % 3 != 1:
                parts.append(labelled(piece, label._replace(message=int(found[i - 1])) if i % 3 else label))
    return joined(parts)


def _mended(run: Run) -> Iterator[Run]:
    """Remove the separators from what the template wrote; a control token with one is none, whoever wrote it."""
    if not run.literal or _BREAK not in run.text:
        yield run._replace(text=run.text.replace(_BREAK, ""))
        return
    for i, text in enumerate(re.split(f"(.{_BREAK})", run.text, flags=re.DOTALL)):
        part = run._replace(text=text.replace(_BREAK, ""))
        yield part._replace(literal=False, kind=FORGED) if i % 2 else part


def _broken(value: Any, control: re.Pattern[str]) -> Any:
    """Return the value with a separator in every control token of its texts."""
    if isinstance(value, str):
        return control.sub(lambda found: found[0][0] + _BREAK + found[0][1:], value)
    if isinstance(value, list | tuple):
        return [_broken(item, control) for item in value]
    if isinstance(value, dict):
        return {key: _broken(item, control) for key, item in value.items()}
    return value
