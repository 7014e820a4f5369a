"""Chat formats: how a conversation becomes text and control tokens. A format is one ChatFormat object; everything
else follows from it.

The rules: a turn, header and closing newline included, carries its speaker's role. Text between two control tokens is
encoded as one piece; control tokens are inserted by number, so a message that spells one stays ordinary text. No
beginning or end of sequence is added. The template for transformers is made from the same object, so it cannot
disagree.
"""

import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np

from megatron_ft.data.roles import ASSISTANT, CONTEXT, PROMPTER, ROLES, SYSTEM
from megatron_ft.data.tokenizer import Tokenizer
from megatron_ft.errors import ConfigError, DataError

Messages = Sequence[Mapping[str, str]]  # {"role": ..., "content": ...}


@dataclass(frozen=True)
class ChatFormat:
    """turns: role number -> the turn's text with {text} once; a role that is missing cannot be said in this format."""

    name: str
    added_tokens: tuple[str, ...]
    stop_token: str
    turns: Mapping[int, str]
    generation_prompt: str

    def encode(
        self, tokenizer: Tokenizer, messages: Messages, add_generation_prompt: bool = False
    ) -> tuple[np.ndarray, np.ndarray]:
        """One conversation: (ids int32 [tokens], roles uint8 [tokens])."""
        return self.encode_many(tokenizer, [messages], add_generation_prompt)[0]

    def encode_many(
        self, tokenizer: Tokenizer, conversations: Sequence[Messages], add_generation_prompt: bool = False
    ) -> list[tuple[np.ndarray, np.ndarray]]:
        """Conversations in one batch, which is much faster than one by one; the result is the same.

        Raises DataError for a role that the format does not know, TokenizerError where the tokenizer lacks one of its
        tokens.
        """
        parts, ends = [], []
        for messages in conversations:
            parts += self._parts(messages, add_generation_prompt)
            ends.append(len(parts))
        controls = {token: np.array([tokenizer.token_id(token)], np.int32) for token in self.added_tokens}
        encoded = iter(tokenizer.encode_batch([part.text for part in parts if not part.control], at_start=False))
        pieces = [controls[part.text] if part.control else next(encoded) for part in parts]
        return _cut(pieces, [part.role for part in parts], ends)

    def text(self, messages: Messages, add_generation_prompt: bool = False) -> str:
        """The conversation as the model sees it, control tokens by their names."""
        return "".join(part.text for part in self._parts(messages, add_generation_prompt))

    @property
    def jinja(self) -> str:
        """The chat template for transformers' apply_chat_template."""
        turns = ""
        for role, turn in self.turns.items():
            names = [name for name, number in ROLES.items() if number == role]
            before, after = map(_jinja_string, turn.split("{text}"))
            turns += f"{{% {'elif' if turns else 'if'} message['role'] in {names} %}}"
            turns += f"{{{{ {before} + message['content'] + {after} }}}}"
        return (
            f"{{% for message in messages %}}{turns}"
            "{% else %}{{ raise_exception('unknown role: ' + message['role']) }}{% endif %}{% endfor %}"
            f"{{% if add_generation_prompt %}}{{{{ {_jinja_string(self.generation_prompt)} }}}}{{% endif %}}"
        )

    def _parts(self, messages: Messages, add_generation_prompt: bool) -> list["_Part"]:
        """A conversation cut into control tokens and the texts between them."""
        parts = [part for message in messages for part in self._turn(message)]
        return parts + self._split(self.generation_prompt, ASSISTANT) if add_generation_prompt else parts

    def _turn(self, message: Mapping[str, str]) -> list["_Part"]:
        name, content = message.get("role"), message.get("content")
        role = ROLES.get(name) if isinstance(name, str) else None
        if role not in self.turns:
            known = ", ".join(name for name, number in ROLES.items() if number in self.turns)
            raise DataError(f"unknown role '{name}': chat format {self.name} knows {known}")
        if not isinstance(content, str):
            raise DataError(
                f"the content of a message by '{name}' is {type(content).__name__}, not text; give a string"
            )
        before, after = (self._split(text, role) for text in self.turns[role].split("{text}"))
        # The header's last text, the message and what follows it up to a control token are one text for the tokenizer.
        head = before.pop().text if before and not before[-1].control else ""
        tail = after.pop(0).text if after and not after[0].control else ""
        middle = [_Part(role, head + content + tail, False)] if head + content + tail else []
        return before + middle + after

    def _split(self, text: str, role: int) -> list["_Part"]:
        """A piece of a template cut at the control tokens."""
        cut = re.split("(" + "|".join(map(re.escape, self.added_tokens)) + ")", text)
        return [_Part(role, part, index % 2 == 1) for index, part in enumerate(cut) if part]


class _Part(NamedTuple):
    role: int
    text: str
    control: bool  # a control token's name, else ordinary text


def _cut(pieces: list[np.ndarray], roles: list[int], ends: list[int]) -> list[tuple[np.ndarray, np.ndarray]]:
    """Token pieces and the role of each, cut into conversations that end at pieces[ends[i]]."""
    if not pieces:
        return [(np.empty(0, np.int32), np.empty(0, np.uint8)) for _ in ends]
    lengths = np.array([len(piece) for piece in pieces])
    tokens, by_token = np.concatenate(pieces), np.repeat(np.array(roles, np.uint8), lengths)
    stops = np.concatenate([[0], np.cumsum(lengths)])[ends][:-1]
    return list(zip(np.split(tokens, stops), np.split(by_token, stops), strict=True))


def _jinja_string(text: str) -> str:
    return json.dumps(text, ensure_ascii=False)


def _chatml_turn(speaker: str) -> str:
    return f"<|im_start|>{speaker}\n{{text}}<|im_end|>\n"


CHATML = ChatFormat(
    name="chatml",
    added_tokens=("<|im_start|>", "<|im_end|>"),
    stop_token="<|im_end|>",
    turns={
        SYSTEM: _chatml_turn("system"),
        PROMPTER: _chatml_turn("user"),
        ASSISTANT: _chatml_turn("assistant"),
        CONTEXT: _chatml_turn("context"),
    },
    generation_prompt="<|im_start|>assistant\n",
)

FORMATS = {chat_format.name: chat_format for chat_format in (CHATML,)}


def get_format(name: str) -> ChatFormat:
    """A format by its name. Raises ConfigError naming those there are."""
    if name not in FORMATS:
        raise ConfigError(f"unknown chat format '{name}': choose one of {', '.join(FORMATS)}")
    return FORMATS[name]
