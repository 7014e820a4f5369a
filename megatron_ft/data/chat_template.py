"""A tokenizer's own chat template (Jinja) as a chat format: the roles of its tokens are found by rendering.

Each message is rendered as a unique placeholder, for every beginning of the conversation. The text that a longer beginning adds belongs
to its last message. The text around the placeholders is the template's own, and only there control tokens are searched for; so a message
that contains the name of a control token remains text. The real messages are rendered too. If the result differs, the template changes
messages in a way that roles cannot follow, and the chat is refused. A template that writes earlier turns differently when later ones
follow is refused too. Tools are rendered as the template does; the text of a call belongs to the message that calls.
"""

import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

from megatron_ft.data import tokenizer_files
from megatron_ft.data.chat_encoding import CONTROL, FIXED, Encoded, Part, encode_parts, split
from megatron_ft.data.roles import ASSISTANT, ROLES
from megatron_ft.data.tokenizer import Tokenizer
from megatron_ft.errors import DataError, TokenizerError
from megatron_ft.files import read_text

REMEDY = "choose another --chat_format"
STAND_IN = "\ue000{}\ue001"  # characters for private use
FOUND = re.compile("\ue000(\\d+)\ue001")
NAMES = {"prompter": "user"}  # names of roles in templates
_PASSED = ("content", "tool_calls", "tool_call_id", "name", "reasoning_content")


@dataclass
class OwnTemplate:
    """A template bound to its tokenizer; the same methods as ChatFormat. jinja: the template's source."""

    jinja: str
    tokens: Mapping[str, str]  # bos_token and so on
    specials: Sequence[str]
    name: str = "tokenizer"
    _skeletons: dict[tuple[str, ...], list[list[tuple[int, str]]]] = field(default_factory=dict)

    def encode(self, tokenizer: Tokenizer, messages: Any, add_generation_prompt: bool = False) -> Any:
        """Return (ids int32 [tokens], role bytes uint8 [tokens]) of one conversation."""
        return self.encode_many(tokenizer, [messages], add_generation_prompt)[0]

    def encode_many(self, tokenizer: Tokenizer, conversations: Any, add_generation_prompt: bool = False) -> Any:
        return split(self.encode_flat(tokenizer, conversations, add_generation_prompt))

    def encode_flat(self, tokenizer: Tokenizer, conversations: Any, add_generation_prompt: bool = False) -> Encoded:
        """Raise DataError for a conversation that the template refuses or changes."""
        return encode_parts(tokenizer, [self._parts(messages, add_generation_prompt) for messages in conversations])

    def text(self, messages: Any, add_generation_prompt: bool = False) -> str:
        return "".join(part.text for part in self._parts(messages, add_generation_prompt))

    @property
    def added_tokens(self) -> tuple[str, ...]:
        """None are added: a tokenizer has the tokens of its own template."""
        return ()

    @property
    def digest(self) -> str:
        return tokenizer_files.fingerprint(self.jinja.encode())

    @cached_property
    def stop_token(self) -> str:
        """The control token that ends the assistant's turn."""
        turn = self._skeleton([{"role": "user"}, {"role": "assistant"}])[-1]
        stand_in = FOUND.search(turn_text(turn))
        if stand_in is None:
            raise TokenizerError(f"the tokenizer's chat template omits the assistant's text; {REMEDY}")
        behind = "".join(text for _, text in turn).split(stand_in[0])[-1]
        found = self._control.search(behind)
        if not found:
            raise TokenizerError(f"the tokenizer's chat template ends no answer with a special token; {REMEDY}")
        return found[0]

    def _parts(self, messages: Any, add_generation_prompt: bool) -> list[Part]:
        roles = [ROLES.get(str(message.get("role"))) for message in messages]
        if None in roles:
            raise DataError(
                f"unknown role {messages[roles.index(None)].get('role')!r}; the roles are {', '.join(ROLES)}"
            )
        passed = [
            {"role": _name(message), **{key: message[key] for key in _PASSED if key in message}} for message in messages
        ]
        tools = next((message["tools"] for message in messages if message.get("tools")), None)
        self._check_tools(tools, passed)
        turns = self._skeleton(passed, tools)
        contents = self._contents(passed, tools, "".join(turn_text(turn) for turn in turns))
        parts: list[Part] = []
        for turn in turns:
            for number, text in turn:
                role_byte = roles[number] | messages[number].get("mark_bits", 0)
                if FOUND.fullmatch(text):
                    parts += [Part(role_byte, contents[number])] if contents[number] else []
                else:
                    parts += self._split(text, role_byte)
        if add_generation_prompt:
            whole = self._render(_stand_ins(passed), True, tools)
            start = "".join(turn_text(turn) for turn in turns)
            if not whole.startswith(start):
                raise TokenizerError(f"the tokenizer's chat template changes earlier turns for an answer; {REMEDY}")
            parts += self._split(whole[len(start) :], ASSISTANT)
        return parts

    def _check_tools(self, tools: Any, passed: list[dict[str, Any]]) -> None:
        """Check definitions and calls: the template writes them within its own text, where the name of a control token would become that
        token.
        """
        calls = [message["tool_calls"] for message in passed if message.get("tool_calls")]
        if (tools or calls) and (found := self._control.search(json.dumps([tools, calls], ensure_ascii=False))):
            raise DataError(f"a tool's definition or call holds the special token '{found[0]}'; leave the chat out")

    def _contents(self, passed: list[dict[str, Any]], tools: Any, skeleton: str) -> list[str]:
        """Return the contents as the template writes them: unchanged, or stripped."""
        real = self._render(passed, False, tools)
        for change in (str, str.strip):
            contents = [change(message["content"]) for message in passed]
            if _filled(skeleton, contents) == real:
                return contents
        raise DataError(f"the tokenizer's chat template changes this chat's messages; leave it out, or {REMEDY}")

    def _skeleton(self, passed: Sequence[Mapping[str, Any]], tools: Any = None) -> list[list[tuple[int, str]]]:
        """Return the template's text for these messages, turn by turn, each as [(message, text)]; a placeholder is a separate text."""
        roles = tuple(message["role"] for message in passed)
        plain = not tools and not any(message.keys() - {"role", "content"} for message in passed)
        if plain and roles in self._skeletons:
            return self._skeletons[roles]
        turns, before, waiting = [], "", []
        messages = _stand_ins(passed)
        for end in range(1, len(roles) + 1):
            waiting.append(end - 1)
            system = roles[end - 1] == "system"
            try:
                now = self._render(messages[:end], False, tools)
            except DataError:
                if not system or end == len(roles):
                    raise
                continue  # some templates write the system message with the question that follows
            if not now.startswith(before):
                raise TokenizerError(
                    "the tokenizer's chat template writes earlier turns differently when later ones follow, so "
                    f"roles cannot be assigned; {REMEDY}"
                )
            if system and end < len(roles) and not FOUND.search(now[len(before) :]):
                continue
            turns.append(_owned(now[len(before) :], waiting))
            before, waiting = now, []
        if plain:
            self._skeletons[roles] = turns
        return turns

    def _render(self, messages: list[dict[str, Any]], add_generation_prompt: bool, tools: Any = None) -> str:
        import jinja2

        try:
            return self._compiled.render(
                messages=messages, add_generation_prompt=add_generation_prompt, tools=tools, **self.tokens
            )
        except (jinja2.TemplateError, TypeError, ValueError, KeyError, IndexError) as error:
            raise DataError(f"the tokenizer's chat template refuses this chat ({error}); see --role_order") from error

    @cached_property
    def _compiled(self) -> Any:
        return _compile(self.jinja)

    @cached_property
    def _control(self) -> re.Pattern[str]:
        return re.compile("|".join(map(re.escape, sorted(self.specials, key=len, reverse=True))) or "(?!)")

    def _split(self, text: str, role_byte: int) -> list[Part]:
        cut = re.split(f"({self._control.pattern})", text)
        return [Part(role_byte, part, CONTROL if i % 2 else FIXED) for i, part in enumerate(cut) if part]


class NoTemplate(TokenizerError):
    """A tokenizer that brings no chat template."""


def own_template(tokenizer: Tokenizer) -> OwnTemplate:
    """Return the template among a tokenizer's files. Raise TokenizerError if there is none, or one that cannot be used."""
    folder = Path(tokenizer.source_files[0]).parent
    config = _read(folder / "tokenizer_config.json")
    source = template_source(folder)
    if source is None:
        raise NoTemplate(f"{folder}: no chat template among the tokenizer's files; {REMEDY}")
    names = {key: value for key in config if key.endswith("_token") and (value := _token_name(config[key])) is not None}
    specials = list(tokenizer.special_tokens)
    for token in getattr(tokenizer.backend, "description", {}).get("added_tokens", []):
        if token.get("special") and token["content"] in source and (token.get("lstrip") or token.get("rstrip")):
            raise TokenizerError(
                f"{folder}: '{token['content']}' swallows the spaces beside it, which roles cannot follow; {REMEDY}"
            )
    template = OwnTemplate(source, names, specials)
    _compile(source)
    template.stop_token  # noqa: B018 - an unfit template is refused here, not at the first chat
    return template


def _filled(skeleton: str, contents: list[str]) -> str:
    return FOUND.sub(lambda match: contents[int(match[1])], skeleton)


def turn_text(turn: list[tuple[int, str]]) -> str:
    return "".join(text for _, text in turn)


def template_source(folder: Path) -> str | None:
    """Return the Jinja source of the chat template among a tokenizer's files; None without one.

    Places, in transformers' order: chat_template.jinja, tokenizer_config.json (of several the default one), chat_template.json.
    """
    file = folder / "chat_template.jinja"
    if file.is_file():
        return read_text(file)
    found = _read(folder / "tokenizer_config.json").get("chat_template")
    found = found or _read(folder / "chat_template.json").get("chat_template")
    if isinstance(found, list):  # several, by name
        found = next((entry.get("template") for entry in found if entry.get("name") == "default"), None)
    return found if isinstance(found, str) else None


def _read(path: Path) -> dict[str, Any]:
    try:
        value = json.loads(path.read_text(encoding="utf-8")) if path.is_file() else {}
    except ValueError as error:
        raise TokenizerError(f"{path}: not valid JSON ({error}); is it the whole file?") from error
    return value if isinstance(value, dict) else {}


def _token_name(token: Any) -> str | None:
    return token.get("content") if isinstance(token, dict) else token if isinstance(token, str) else None


def _compile(source: str) -> Any:
    """Compile the template as transformers does: in a sandbox, lines with only tags are removed."""
    from jinja2 import TemplateError
    from jinja2.ext import loopcontrols
    from jinja2.sandbox import ImmutableSandboxedEnvironment

    def raise_exception(message: str) -> None:
        raise TemplateError(message)

    def tojson(value: Any, indent: int | None = None, ensure_ascii: bool = False, **more: Any) -> str:
        return json.dumps(value, ensure_ascii=ensure_ascii, indent=indent)

    def now(form: str) -> None:
        raise TemplateError(f"contains today's date ({form}), which would differ between training and use")

    environment = ImmutableSandboxedEnvironment(trim_blocks=True, lstrip_blocks=True, extensions=[loopcontrols])
    environment.filters["tojson"] = tojson
    environment.globals |= {"raise_exception": raise_exception, "strftime_now": now}
    try:
        return environment.from_string(source)
    except TemplateError as error:
        raise TokenizerError(f"the tokenizer's chat template cannot be read ({error}); {REMEDY}") from error


def _name(message: Mapping[str, Any]) -> str:
    return NAMES.get(message["role"], message["role"])


def _stand_ins(passed: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
    """Return the messages with placeholders for their texts. An empty text beside tool calls stays empty, because templates test for it."""
    return [
        {**message, "content": "" if message.get("tool_calls") and not message["content"] else STAND_IN.format(number)}
        for number, message in enumerate(passed)
    ]


def _owned(text: str, messages: list[int]) -> list[tuple[int, str]]:
    """Return the text of a turn split at the placeholders. Text of the template belongs to the message that follows; after the last
    message to that one.
    """
    cut = FOUND.split(text)  # text, number, text, ..., text
    numbers = [int(number) for number in cut[1::2]]
    if any(number not in messages for number in numbers):
        raise TokenizerError(f"the tokenizer's chat template repeats messages; {REMEDY}")
    owners = [*numbers, numbers[-1] if numbers else messages[-1]]
    pieces: list[tuple[int, str]] = []
    for i, literal in enumerate(cut[::2]):
        pieces.append((owners[i], literal))
        if i < len(numbers):
            pieces.append((numbers[i], STAND_IN.format(numbers[i])))
    return [(owner, piece) for owner, piece in pieces if piece]
