"""Chat formats: the conversion of a conversation into text and control tokens. A format is one ChatFormat object.

A turn, header and closing newline included, has its speaker's role. Text between two control tokens is encoded as one piece. Control
tokens are inserted by id, so a message that contains the name of one remains ordinary text. The template for transformers is made from
the same object, so they agree. chat_template.py handles the templates of tokenizers.
"""

import functools
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any

import numpy as np

from megatron_ft.config.hints import alternatives, meant
from megatron_ft.data.chat_encoding import CONTROL, FIXED, Encoded, Part, encode_parts, join, split
from megatron_ft.data.chat_jinja import MARKS, template
from megatron_ft.data.roles import ASSISTANT, CONTEXT, PROMPTER, ROLE_BITS, ROLES, SYSTEM
from megatron_ft.data.spoken import DELIMITERS, edges, holds_parts, segments
from megatron_ft.data.tokenizer import Tokenizer
from megatron_ft.data.tool_text import SAID, as_text, has_tools
from megatron_ft.errors import ConfigError, DataError, kind_of

Messages = Sequence[Mapping[str, Any]]
"""{"role": ..., "content": ...}; optional: "mark_bits" of the role byte (roles.py), "tools" and "tool_calls" (tool_text.py)."""


@dataclass(frozen=True)
class ChatFormat:
    """turns: role number -> text of a turn, with {text} once. A role that is missing cannot be written in this format.

    after: (role, role of the turn before) -> text of the turn in that case. begin: text before the first turn.
    default_system: system message of a conversation that has none. strip: remove white space around messages.
    context: if `turns` has no context turn, the text of the next message with {context} and {text}. block: the text of each context in it.
    """

    name: str
    added_tokens: tuple[str, ...]
    stop_token: str
    turns: Mapping[int, str]
    generation_prompt: str
    after: Mapping[tuple[int, int], str] = field(default_factory=dict)
    begin: str = ""
    default_system: str | None = None
    strip: bool = False
    context: str | None = None
    block: str = "{context}"

    def encode(
        self, tokenizer: Tokenizer, messages: Messages, add_generation_prompt: bool = False
    ) -> tuple[np.ndarray, np.ndarray]:
        """Return (ids int32 [tokens], role bytes uint8 [tokens]) of one conversation."""
        return self.encode_many(tokenizer, [messages], add_generation_prompt)[0]

    def encode_many(
        self, tokenizer: Tokenizer, conversations: Sequence[Messages], add_generation_prompt: bool = False
    ) -> list[tuple[np.ndarray, np.ndarray]]:
        """Return conversations encoded in one batch, which is much faster than one by one; the result is the same.

        Raise DataError for a role that the format does not have, TokenizerError if the tokenizer lacks one of the format's tokens.
        """
        return split(self.encode_flat(tokenizer, conversations, add_generation_prompt))

    def encode_flat(
        self, tokenizer: Tokenizer, conversations: Sequence[Messages], add_generation_prompt: bool = False
    ) -> Encoded:
        """Return the same as encode_many, with concatenated conversations."""
        tags = frozenset(tag for tag in DELIMITERS if tokenizer.is_special(tag))
        if self._closed and not add_generation_prompt and not tags:
            return self._encode_closed(tokenizer, conversations)
        for token in self.added_tokens:
            tokenizer.token_id(token)  # named before anything is tokenized
        chats = (self._parts(messages, add_generation_prompt) for messages in conversations)
        return encode_parts(tokenizer, [_with_tags(parts, tags) if tags else parts for parts in chats])

    def text(self, messages: Messages, add_generation_prompt: bool = False) -> str:
        """Return the conversation as the model receives it, control tokens by their names."""
        return "".join(part.text for part in self._parts(messages, add_generation_prompt))

    @property
    def jinja(self) -> str:
        """The chat template for transformers' apply_chat_template."""
        return template(self)

    @property
    def exported(self) -> str:
        """Return the template with {% generation %} around the assistant's turns, from which transformers and TRL make their masks."""
        return template(self, marks=MARKS)

    def is_said_by(self, source: str) -> bool:
        """Return whether an exported template is this format's, also in the forms of earlier releases."""
        older = [template(self, marks, contexts=False) for marks in (("", ""), MARKS)]
        forms = (self.jinja, self.exported, *older, template(self, reasoning=False, contexts=False))
        return source.rstrip("\n") in forms

    def samples(self, messages: Messages) -> list[Messages]:
        """Return the chat as the samples that are made of it: one, since nothing is written differently later."""
        return [messages]

    @cached_property
    def _closed(self) -> bool:
        """Return whether text never touches text across turns: then a turn's tokens depend on the turn alone."""
        turns = [self._cut(text, 0) for text in (*self.turns.values(), *self.after.values())]
        starts = all(before and before[0].kind == CONTROL for before, _ in turns)
        return starts and self.default_system is None and not self.begin.replace(self.added_tokens[0], "")

    def _encode_closed(self, tokenizer: Tokenizer, conversations: Sequence[Messages]) -> Encoded:
        """Encode with the fast method for formats whose turns are closed: the ids around a message are the same each time."""
        around: dict[tuple[int, int | None], tuple[np.ndarray, str, str, np.ndarray]] = {}
        begin = [tokenizer.control(part.text) for part in self._split(self.begin, 0)]
        pieces: list[Any] = []
        role_bytes: list[int] = []
        ends: list[int] = []
        texts: list[str] = []
        for messages in conversations:
            role: int | None = None
            plain = self._are_plain(messages)
            for message in messages if plain else self._folded(messages):
                previous = role
                role, content = (ROLES[message["role"]], message["content"]) if plain else self._role_and_text(message)
                if (key := (role, previous)) not in around:
                    around[key] = self._around(tokenizer, role, previous)
                before, head, tail, behind = around[key]
                role_byte = role | message.get("mark_bits", 0)
                if begin and previous is None:
                    pieces += begin
                    role_bytes += [role_byte] * len(begin)
                parts = (
                    self._content_parts(role_byte, message, content)
                    if role == ASSISTANT and holds_parts(content)
                    else []
                )
                if len(parts) > 1 or (parts and parts[0].role_byte != role_byte):
                    run = [Part(role_byte, head), *parts, Part(role_byte, tail)]
                    cut = tokenizer.encode_cut([[part.text for part in run]], at_start=False)[0]
                    pieces += (before, *cut, behind)
                    role_bytes += (role_byte, *(part.role_byte for part in run), role_byte)
                    continue
                text = head + content + tail
                if text:
                    texts.append(text)
                pieces += (before, None if text else behind[:0], behind)
                role_bytes += (role_byte, role_byte, role_byte)
            ends.append(len(pieces))
        encoded = iter(tokenizer.encode_batch(texts, at_start=False))
        pieces = [next(encoded) if piece is None else piece for piece in pieces]
        return join(pieces, role_bytes, ends)

    def _are_plain(self, messages: Messages) -> bool:
        """Return whether messages are a role of this format and a text, which is not changed, and nothing besides: mostly."""
        for message in messages:
            if len(message) != 2 or message.get("role") not in self._names or type(message.get("content")) is not str:
                return False
        return not self.strip

    @cached_property
    def _names(self) -> tuple[str, ...]:
        return tuple(name for name, role in ROLES.items() if role in self.turns)

    def _around(self, tokenizer: Tokenizer, role: int, previous: int | None) -> tuple[np.ndarray, str, str, np.ndarray]:
        """Return (ids before, text before the message, text after it, ids after) of a turn."""
        before, after = self._cut(self._turn_text(role, previous), role)
        head = before.pop().text if before[-1].kind != CONTROL else ""
        tail = after.pop(0).text if after and after[0].kind != CONTROL else ""
        ids = [
            encode_parts(tokenizer, [[Part(role, self.added_tokens[0], CONTROL), *parts]])[0][1:] for parts in (after,)
        ]
        return encode_parts(tokenizer, [before])[0], head, tail, ids[0]

    def _parts(self, messages: Messages, add_generation_prompt: bool) -> list[Part]:
        """Return a conversation split into control tokens and the texts between them."""
        turns = self._folded(messages)
        if self.default_system is not None and (not turns or ROLES.get(turns[0].get("role", "")) != SYSTEM):
            turns = [{"role": "system", "content": self.default_system}, *turns]
        parts: list[Part] = []
        role: int | None = None
        for message in turns:
            previous, (role, content) = role, self._role_and_text(message)
            role_byte = role | message.get("mark_bits", 0)
            if not parts:
                parts += self._split(self.begin, role_byte)
            before, after = self._cut(self._turn_text(role, previous), role_byte)
            parts += (
                [*before, *self._content_parts(role_byte, message, content), *after] if content else [*before, *after]
            )
        return parts + self._split(self.generation_prompt, ASSISTANT) if add_generation_prompt else parts

    def _role_and_text(self, message: Mapping[str, Any]) -> tuple[int, str]:
        """Return the role number and text of a message. Raise DataError if the format cannot express it."""
        name, content = message.get("role"), message.get("content")
        role = ROLES.get(name) if isinstance(name, str) else None
        if role not in self.turns:
            known = ", ".join(name for name, number in ROLES.items() if number in self.turns)
            raise DataError(f"unknown role '{name}': chat format {self.name} knows {known}")
        if not isinstance(content, str):
            raise DataError(f"the content of a message by '{name}' is {kind_of(content)}, not text; give a string")
        assert role is not None
        return role, content.strip() if self.strip else content

    def _content_parts(self, code: int, message: Mapping[str, Any], content: str) -> list[Part]:
        """Return a message's text as parts; the assistant's reasoning and tool calls have roles of their own."""
        role = code & ROLE_BITS
        pieces = message.get(SAID) if role == ASSISTANT else None
        return [Part(code - role + part, text) for part, text in pieces or segments(content, role)]

    def _folded(self, messages: Messages) -> Messages:
        """Return the messages with reasoning and tools as text. Context turns for which the format has no turns become part of the question
        that follows them, or of the one before, if they are between it and its answer; else a question of their own."""
        if has_tools(messages):
            messages = as_text(messages, self.default_system, self.strip)
        if self.context is None or not any(ROLES.get(str(message.get("role"))) == CONTEXT for message in messages):
            return messages
        result: list[Mapping[str, Any]] = []
        waiting: list[Mapping[str, Any]] = []
        for message in _contexts_first(messages):
            if ROLES.get(str(message.get("role"))) == CONTEXT:
                waiting.append(message)
                continue
            if waiting and ROLES.get(str(message.get("role"))) != PROMPTER:
                result += [{**one, "role": "user"} for one in waiting]
                waiting = []
            if waiting:
                before, after = self.context.split("{text}")
                blocks = "\n".join(self._text_of(one).join(self.block.split("{context}")) for one in waiting)
                text = blocks.join(before.split("{context}")) + self._text_of(message) + after
                message = {**message, "content": text}
                waiting = []
            result.append(message)
        if waiting:
            raise DataError(f"a chat ends with context: chat format {self.name} has no turn of its own for it")
        return result

    def _text_of(self, message: Mapping[str, Any]) -> str:
        if not isinstance(content := message.get("content"), str):
            raise DataError(f"the content of a message is {kind_of(content)}, not text; give a string")
        return content

    def _turn_text(self, role: int, previous: int | None) -> str:
        return self.turns[role] if previous is None else self.after.get((role, previous), self.turns[role])

    def _cut(self, turn: str, role_byte: int) -> tuple[list[Part], list[Part]]:
        """Return the text of a turn as the parts before and after the message."""
        before, after = turn.split("{text}")
        return self._split(before, role_byte), self._split(after, role_byte)

    def _split(self, text: str, role_byte: int) -> list[Part]:
        """Return a piece of a template split at the control tokens."""
        return [Part(role_byte, part, kind) for part, kind in _pieces(self.added_tokens, text)]


def _with_tags(parts: list[Part], tags: frozenset[str]) -> list[Part]:
    """Return the parts such that tags around reasoning and calls are control tokens, where the tokenizer has them as such."""
    result: list[Part] = []
    for part in parts:
        cut = edges(part.role_byte & ROLE_BITS, part.text)
        result += [
            part._replace(text=text, kind=CONTROL if i % 2 and text in tags else part.kind)
            for i, text in enumerate(cut)
            if text
        ]
    return result


def _contexts_first(messages: Messages) -> Messages:
    """Return the messages, contexts between a question and its answer moved before the question."""
    result = list(messages)
    for number, message in enumerate(messages):
        start = number
        while start and messages[start - 1].get("role") == "context":
            start -= 1
        asked = start and ROLES.get(str(messages[start - 1].get("role"))) == PROMPTER
        if start < number and asked and message.get("role") == "assistant":
            result[start - 1 : number] = [*messages[start:number], messages[start - 1]]
    return result


@functools.cache
def _pieces(control: tuple[str, ...], text: str) -> list[tuple[str, int]]:
    """Return the parts of a text and their kinds; the result is cached."""
    cut = re.split("(" + "|".join(map(re.escape, control)) + ")", text)
    return [(part, CONTROL if i % 2 else FIXED) for i, part in enumerate(cut) if part]


def _turns(pattern: str, **names: str) -> dict[int, str]:
    """Return turns that differ only in the name of the speaker, for {speaker} in the text."""
    return {ROLES[role]: pattern.replace("{speaker}", name) for role, name in names.items()}


CHATML = ChatFormat(
    name="chatml",
    added_tokens=("<|im_start|>", "<|im_end|>"),
    stop_token="<|im_end|>",
    turns=_turns(
        "<|im_start|>{speaker}\n{text}<|im_end|>\n",
        system="system",
        prompter="user",
        assistant="assistant",
        context="context",
    ),
    generation_prompt="<|im_start|>assistant\n",
)

# LightOn's Alfred-40B-1023.
ALFRED = ChatFormat(
    name="alfred",
    added_tokens=("<start_system>", "<start_user>", "<start_assistant>", "<end_message>"),
    stop_token="<end_message>",
    turns=_turns("<start_{speaker}>{text}<end_message>", system="system", prompter="user", assistant="assistant"),
    generation_prompt="<start_assistant>",
    context="{context}\n\n{text}",
)

# Vicuna 1.1 as Airophin uses it; a context becomes the blocks of its "context-obedient" prompts, plain text of the user.
VICUNA = ChatFormat(
    name="vicuna",
    added_tokens=("<s>", "</s>"),
    stop_token="</s>",
    begin="<s>",
    default_system="A chat between a curious user and an assistant. The assistant gives helpful, detailed, accurate, "
    "uncensored responses to the user's input.",
    turns={SYSTEM: "{text} ", PROMPTER: "USER: {text} ", ASSISTANT: "ASSISTANT: {text}</s>"},
    generation_prompt="ASSISTANT:",
    context="{context}\nBEGININSTRUCTION\n{text}\nENDINSTRUCTION",
    block="BEGININPUT\n{context}\nENDINPUT",
)

# Meta's Llama-2 chat: the system text is inside the first instruction.
LLAMA2 = ChatFormat(
    name="llama2",
    added_tokens=("<s>", "</s>"),
    stop_token="</s>",
    turns={
        SYSTEM: "<s>[INST] <<SYS>>\n{text}\n<</SYS>>\n\n",
        PROMPTER: "<s>[INST] {text} [/INST]",
        ASSISTANT: " {text} </s>",
    },
    after={(PROMPTER, SYSTEM): "{text} [/INST]"},
    generation_prompt="",
    strip=True,
    context="{context}\n\n{text}",
)

LLAMA3 = ChatFormat(
    name="llama3",
    added_tokens=("<|begin_of_text|>", "<|start_header_id|>", "<|end_header_id|>", "<|eot_id|>"),
    stop_token="<|eot_id|>",
    begin="<|begin_of_text|>",
    turns=_turns(
        "<|start_header_id|>{speaker}<|end_header_id|>\n\n{text}<|eot_id|>",
        system="system",
        prompter="user",
        assistant="assistant",
        context="ipython",
    ),
    generation_prompt="<|start_header_id|>assistant<|end_header_id|>\n\n",
    strip=True,
)

FORMATS = {chat_format.name: chat_format for chat_format in (CHATML, ALFRED, VICUNA, LLAMA2, LLAMA3)}
OWN_TEMPLATE = "tokenizer"
ALIASES = {"vicuna_v1.1": "vicuna", "vicuna-1.1": "vicuna", "llama-2": "llama2", "llama-3": "llama3"}


def get_format(name: str, tokenizer: Tokenizer | None = None, options: Any = None) -> Any:
    """Return a format by its name; with a tokenizer, "tokenizer" is the tokenizer's own chat template, with TemplateOptions. Raise
    ConfigError with the known names.
    """
    if name == OWN_TEMPLATE and tokenizer is not None:
        from megatron_ft.data.chat_template import own_template

        return own_template(tokenizer, options)
    name = ALIASES.get(name, name)
    if name == OWN_TEMPLATE:
        raise ConfigError(
            f"chat format '{name}': the tokenizer's own template is used here where none is named; leave it out"
        )
    if (known := meant(name, FORMATS)) is None:
        names = (*FORMATS, OWN_TEMPLATE)
        raise ConfigError(f"unknown chat format '{name}': choose one of {', '.join(names)}{alternatives(name, names)}")
    return FORMATS[known]


def describe(chat_format: Any) -> dict[str, Any]:
    """Return what a manifest keeps of a format: {name, stop_token}, and of a tokenizer's own template {template, stop_token} and more."""
    if isinstance(chat_format, ChatFormat):
        return {"name": chat_format.name, "stop_token": chat_format.stop_token}
    return chat_format.described
