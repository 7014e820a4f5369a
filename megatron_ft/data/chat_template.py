"""A tokenizer's own chat template (Jinja) as a chat format: the ids that transformers renders, and who speaks.

template_text.py says what the template writes and whose text it is. Control tokens are looked for in the template's own text alone, so
a message that spells one stays text here too. template_samples.py says which samples a chat becomes.
"""

import json
import re
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from functools import cached_property
from itertools import accumulate, groupby, takewhile
from pathlib import Path
from typing import Any

from megatron_ft.data import tokenizer_files
from megatron_ft.data.chat_encoding import CONTROL, FIXED, Encoded, Part, encode_parts, split
from megatron_ft.data.roles import ASSISTANT, CONTEXT, ROLES
from megatron_ft.data.spoken import delimiters, holds_parts, turn_roles
from megatron_ft.data.template_complete import Places, check_complete, has_effect, places
from megatron_ft.data.template_files import CONFIG, DEFAULT, named_tokens, read_object, template_sources
from megatron_ft.data.template_options import TemplateOptions, today
from megatron_ft.data.template_samples import as_asked, rewrites, samples
from megatron_ft.data.template_text import AS_ASKED, ONLY_READ, OTHER, OURS, REMEDY, Run, TemplateText, cut, text_of
from megatron_ft.data.tokenizer import Tokenizer
from megatron_ft.data.traced import DEFINED, FORGED
from megatron_ft.errors import DataError, TokenizerError

__all__ = ["NoTemplate", "OwnTemplate", "TemplateOptions", "own_template", "today"]

MOST_KEYS = (
    1000  # of which is known whether a template takes notice of them; of a file whose keys are data there is no end
)


def is_text(value: Any) -> bool:
    """Whether a value can be written as JSON in UTF-8."""
    try:
        json.dumps(value, ensure_ascii=False, allow_nan=False).encode()
    except (ValueError, TypeError, RecursionError):
        return False
    return True


@dataclass
class OwnTemplate:
    """A template bound to its tokenizer; the same methods as ChatFormat. stripping: control token -> whether it swallows the white
    space (before, behind) it."""

    template: TemplateText
    stripping: Mapping[str, tuple[bool, bool]] = field(default_factory=dict)
    name: str = "tokenizer"
    _read: dict[str, bool] = field(default_factory=dict)

    def encode(self, tokenizer: Tokenizer, messages: Any, add_generation_prompt: bool = False) -> Any:
        """Return (ids int32 [tokens], role bytes uint8 [tokens]) of one conversation."""
        return self.encode_many(tokenizer, [messages], add_generation_prompt)[0]

    def encode_many(self, tokenizer: Tokenizer, conversations: Any, add_generation_prompt: bool = False) -> Any:
        return split(self.encode_flat(tokenizer, conversations, add_generation_prompt))

    def encode_flat(self, tokenizer: Tokenizer, conversations: Any, add_generation_prompt: bool = False) -> Encoded:
        """Raise DataError for a conversation that the template refuses, or of which it leaves something out."""
        taken = map(self._taken, conversations)
        return encode_parts(tokenizer, [self._parts(messages, add_generation_prompt) for messages in taken])

    def text(self, messages: Any, add_generation_prompt: bool = False) -> str:
        return text_of(self._runs(self._taken(messages), add_generation_prompt))

    def samples(self, messages: Any) -> list[Any]:
        """Return the samples that a chat becomes. Raise DataError if one of its messages would be in none."""
        messages = self._taken(messages)
        found = samples(self.template, messages, known=not self.rewrites)
        if self.rewrites:
            check_complete(self.template, messages, [(sample, self._runs(sample)) for sample in found], self.places)
        return found

    @property
    def jinja(self) -> str:
        """Return the source of the template for a chat without tools."""
        return self.template.source(None)

    @property
    def exported(self) -> dict[str, str]:
        """Return the sources by name, with {% generation %} around the assistant's turns if a place for it is found."""
        from megatron_ft.data.template_marks import with_marks

        return {
            name: self._with_its_end(with_marks(source, self.template))
            for name, source in self.template.sources.items()
        }

    def _with_its_end(self, source: str) -> str:
        """Return the source with the tokenizer's own end token as eos_token; that of the export is the stop token."""
        own = self.template.tokens.get("eos_token")
        if own in (None, self.stop_token) or "eos_token" not in source:
            return source
        return f"{{%- set eos_token = {json.dumps(own, ensure_ascii=False)} -%}}" + source

    @property
    def added_tokens(self) -> tuple[str, ...]:
        """None are added: a tokenizer has the tokens of its own template."""
        return ()

    @property
    def digest(self) -> str:
        sources = self.template.sources
        alone = len(sources) == 1 and DEFAULT in sources
        return tokenizer_files.fingerprint(self.jinja.encode() if alone else sorted(sources.items()))

    @property
    def described(self) -> dict[str, str]:
        """Return the manifest's entry: {template, stop_token}, and the date and arguments if there are any."""
        options = self.template.options
        arguments = json.dumps(dict(options.arguments), sort_keys=True) if options.arguments else None
        more = {"template_date": options.date, "template_arguments": arguments}
        return {"template": self.digest, "stop_token": self.stop_token} | {k: v for k, v in more.items() if v}

    @cached_property
    def stop_token(self) -> str:
        """The control token that ends the assistant's turn."""
        runs = self.template.runs([{"role": "user", "content": "Question"}, {"role": "assistant", "content": "Answer"}])
        answer = [i for i, run in enumerate(runs) if run.message == 1 and not run.literal]
        if not answer:
            raise TokenizerError(f"the tokenizer's chat template omits the assistant's text; {REMEDY}")
        found = self.template.control.search(text_of(runs[answer[-1] + 1 :]))
        if not found:
            raise TokenizerError(f"the tokenizer's chat template ends no answer with a special token; {REMEDY}")
        return found[0]

    @cached_property
    def rewrites(self) -> bool:
        """Whether turns are written differently once later ones follow."""
        return rewrites(self.template)

    @cached_property
    def places(self) -> Places:
        """For which of name, reasoning_content, tools and documents the template has a place."""
        return places(self.template)

    def reads(self, key: str) -> bool:
        """Whether the template takes notice of a key of messages that has no meaning of its own here."""
        if key not in self._read and len(self._read) < MOST_KEYS:
            self._read[key] = key not in OURS and has_effect(self.template, key)
        return self._read.get(key, False)

    def _taken(self, messages: Any) -> Any:
        """Return the messages with what else they say, as far as the template takes notice of it."""
        if not any(OTHER in message for message in messages):
            return messages
        result = []
        for message in messages:
            others = {key: value for key, value in message.get(OTHER, {}).items() if self.reads(key)}
            if not is_text(others):
                raise DataError(
                    "a message says what JSON cannot say (half a character, a date), which the template would write"
                )
            result.append({**{key: value for key, value in message.items() if key != OTHER}, **others})
        return result

    def _runs(self, messages: Any, add_generation_prompt: bool = False) -> list[Run]:
        asked = as_asked(self.template, messages) if messages and messages[-1].get(AS_ASKED) else None
        return self.template.runs(messages, add_generation_prompt) if asked is None else asked

    def _parts(self, messages: Any, add_generation_prompt: bool) -> list[Part]:
        runs = self._runs(messages, add_generation_prompt)
        if not self.rewrites:
            check_complete(self.template, messages, [(messages, runs)], self.places, add_generation_prompt)
        parts: list[Part] = []
        for role_byte, literal, text in self._coded(messages, runs):
            parts += self._split(text, role_byte) if literal else [Part(role_byte, text)]
        return _swallowed(parts, self.stripping) if self.stripping else parts

    def _coded(self, messages: Any, runs: list[Run]) -> Iterator[tuple[int, bool, str]]:
        """(role byte, whether it is the template's own, text) of each stretch."""
        for number, turn in self._turns(messages, runs):
            message: Mapping[str, Any] = (
                messages[number] if number is not None else {"role": "assistant"}
            )  # an answer to come
            flags, role = message.get("mark_bits", 0), ROLES[message["role"]]
            if role != ASSISTANT:
                yield from ((role | flags, run.literal, run.text) for run in turn)
                continue
            if not message.get(ONLY_READ):
                before, turn = self._opened(turn, number == 0)
                yield from ((CONTEXT | flags, run.literal, run.text) for run in before)
            for part, literal, text in self._spoken(turn):
                yield (CONTEXT if message.get(ONLY_READ) else part) | flags, literal, text

    def _turns(self, messages: Any, runs: list[Run]) -> list[tuple[int | None, list[Run]]]:
        """Return the runs by message. Where the template writes several messages in one round (of a loop over pairs), a control token
        says where the earlier one ends."""
        turns = [(number, list(group)) for number, group in groupby(runs, key=lambda run: run.message)]
        answers = [number is None or messages[number]["role"] == "assistant" for number, _ in turns]
        for i in range(1, len(turns)):
            (before, earlier), (number, turn) = turns[i - 1 : i + 1]
            lead = text_of(list(takewhile(lambda run: run.literal, turn)))
            end = 0
            if answers[i]:
                start = 0 if lead.startswith(self._opening) else lead.rfind(self._opening)
                end = start if start > 0 and self.template.control.search(lead[:start]) else 0
            elif answers[i - 1] and self.stop_token not in text_of([run for run in earlier if run.literal]):
                end = lead.find(self.stop_token) + len(self.stop_token) if self.stop_token in lead else 0
            if end:
                ended, turn = cut(turn, end)
                turns[i - 1 : i + 1] = [(before, earlier + ended), (number, turn)]
        return turns

    def _opened(self, turn: list[Run], first: bool) -> tuple[list[Run], list[Run]]:
        """Cut what the template writes before an answer that is not its own: definitions of tools, and what stands before each chat,
        such as a system message of the template, if the chat begins with an answer."""
        if not first and not any(run.kind == DEFINED for run in turn):
            return [], turn
        lead = list(takewhile(lambda run: run.literal or run.kind == FORGED, turn))
        text, ends = text_of(lead), list(accumulate(len(run.text) for run in lead))
        start = max(
            (
                end
                for run, end in zip(lead, ends, strict=True)
                if run.kind in (DEFINED, FORGED) or (first and run.ahead)
            ),
            default=0,
        )
        return cut(turn, max(start, text.rfind(self._opening) if first and self._opening else 0))

    @cached_property
    def _opening(self) -> str:
        """The control token, else the text, with which an answer begins."""
        asked, answer = {"role": "user", "content": "Question"}, {"role": "assistant", "content": "Answer"}
        try:
            header = text_of([run for run in self.template.runs([asked], True) if run.message is None])
        except DataError:
            header = ""  # the template takes no question alone
        if header.strip():
            found = self.template.control.search(header)
            return found[0] if found else header.strip()
        turn = [run for run in self.template.runs([asked, answer]) if run.message == 1]
        lead = text_of(list(takewhile(lambda run: run.literal, turn)))
        return [*self.template.control.findall(lead), ""][-2 if self.template.control.search(lead) else -1]

    def _spoken(self, turn: list[Run]) -> Iterator[tuple[int, bool, str]]:
        """Return the stretches of an assistant's turn by role. Text after the end of the turn is context; if the template has
        {% generation %} marks, so is all text outside of them.
        """
        text = text_of(turn)
        if not (self.template.has_marks or holds_parts(text) or any(run.behind or run.kind for run in turn)):
            yield from ((ASSISTANT, run.literal, run.text) for run in turn)  # as mostly
            return
        literal = [run.literal for run in turn for _ in run.text]
        kinds = [run.kind for run in turn for _ in run.text]
        roles = turn_roles(text, kinds, literal, self.template.control)
        for start, stop in delimiters(text, kinds):
            literal[start:stop] = [True] * (stop - start)  # a tag that is a special token becomes that token
        ended = self.stop_token in text_of([run for run in turn if run.literal and not run.behind])
        read = [
            (run.behind and ended) or (self.template.has_marks and not run.trained and run.message is not None)
            for run in turn
            for _ in run.text
        ]
        roles = bytearray(CONTEXT if only else role for role, only in zip(roles, read, strict=True))
        at = 0
        for (role, own), same in groupby(zip(roles, literal, strict=True)):
            length = sum(1 for _ in same)
            yield role, own, text[at : at + length]
            at += length

    def _split(self, text: str, role_byte: int) -> list[Part]:
        cut = re.split(f"({self.template.control.pattern})", text)
        return [Part(role_byte, part, CONTROL if i % 2 else FIXED) for i, part in enumerate(cut) if part]


class NoTemplate(TokenizerError):
    """A tokenizer that brings no chat template."""


def own_template(tokenizer: Tokenizer, options: TemplateOptions | None = None) -> OwnTemplate:
    """Return the template among a tokenizer's files. Raise TokenizerError if there is none, or one that cannot be used."""
    folder = Path(tokenizer.source_files[0]).parent
    sources = template_sources(folder)
    if not sources:
        raise NoTemplate(f"{folder}: no chat template among the tokenizer's files; {REMEDY}")
    named = named_tokens(folder)
    specials = dict.fromkeys([*tokenizer.special_tokens, *(name for name in named.values() if tokenizer.has(name))])
    text = TemplateText(sources, named, list(specials), options or TemplateOptions())
    template = OwnTemplate(text, _stripping(tokenizer, folder))
    template.stop_token  # noqa: B018 - an unfit template is refused here, not at the first chat
    return template


def _stripping(tokenizer: Tokenizer, folder: Path) -> dict[str, tuple[bool, bool]]:
    decoder = read_object(folder / CONFIG).get("added_tokens_decoder") or {}
    listed = [*decoder.values(), *getattr(tokenizer.backend, "description", {}).get("added_tokens", [])]
    return {
        token["content"]: (bool(token.get("lstrip")), bool(token.get("rstrip")))
        for token in listed
        if token.get("special") and (token.get("lstrip") or token.get("rstrip"))
    }


def _swallowed(parts: list[Part], stripping: Mapping[str, tuple[bool, bool]]) -> list[Part]:
    """Return the parts without white space that is removed by control tokens next to it."""
    parts = _stripped(parts, {token for token, sides in stripping.items() if sides[1]}, _lstrip)
    return _stripped(parts[::-1], {token for token, sides in stripping.items() if sides[0]}, _rstrip)[::-1]


def _stripped(parts: list[Part], tokens: set[str], strip: Callable[[str], str]) -> list[Part]:
    swallowing, kept = False, []
    for part in parts:
        if part.kind == CONTROL:
            swallowing = part.text in tokens
        elif swallowing:
            part = part._replace(text=strip(part.text))
            swallowing = not part.text
        if part.text:
            kept.append(part)
    return kept


_SPACES = "".join(chr(i) for i in range(0x3001) if chr(i).isspace() and not 0x1C <= i <= 0x1F)


def _lstrip(text: str) -> str:
    return text.lstrip(_SPACES)


def _rstrip(text: str) -> str:
    return text.rstrip(_SPACES)
