"""Texts of tasks as ids, as transformers' tokenizers read them for lm-eval: names of control tokens are those tokens."""

from __future__ import annotations

import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from megatron_ft.errors import ConfigError, TokenizerError
from megatron_ft.files import read_json
from megatron_ft.generation.loading import ChatModel


class Texts:
    """Encodes prompts and conversations. bos: whether a text begins with the begin-of-text token; None: as the tokenizer's files say."""

    def __init__(self, chat: ChatModel, bos: bool | None = None):
        self.tokenizer, self.chat_format = chat.tokenizer, chat.chat_format
        if self.tokenizer.eos_id is None:
            raise TokenizerError(f"{self.tokenizer.source_files[0]}: has no end-of-text token, which lm-eval needs")
        self.end = self.tokenizer.eos_id
        self.prefix = self.end if self.tokenizer.bos_id is None else self.tokenizer.bos_id
        self.bos = self.tokenizer.bos_id is not None and (adds_bos(chat) if bos is None else bos)
        names = sorted(self.tokenizer.special_tokens, key=len, reverse=True)
        self._names = re.compile("(" + "|".join(map(re.escape, names)) + ")")

    def encode(self, text: str, add_special_tokens: bool | None = None) -> list[int]:
        """Return the ids, with the begin-of-text token where it is asked for or usual and not there yet."""
        begins = text.startswith(self.tokenizer.id_to_token(self.prefix))
        ids = (
            [self.prefix]
            if (self.bos and not begins if add_special_tokens is None else self._asked(add_special_tokens))
            else []
        )
        at_start = True
        for n, part in enumerate(self._names.split(text)):
            if n % 2:
                ids += self.tokenizer.control(part).tolist()
            elif part:
                ids += self.tokenizer.encode(part, at_start=at_start).tolist()
            at_start = at_start and not part
        return ids

    def _asked(self, add_special_tokens: bool) -> bool:
        return add_special_tokens and self.bos

    def conversation(self, messages: list[dict[str, str]], add_generation_prompt: bool = True) -> str:
        """Return the text of a conversation for the assistant to answer, or whose last message it is to continue."""
        text = self._format.text(messages, add_generation_prompt)
        if add_generation_prompt:
            return text
        last = messages[-1]["content"]
        return text[: text.rindex(last) + len(last)]

    @property
    def template(self) -> str:
        return self._format.jinja

    @property
    def _format(self) -> Any:
        if self.chat_format is None:
            raise ConfigError("--apply_chat_template: the model has no chat format; give one with --chat_format")
        return self.chat_format


def adds_bos(chat: ChatModel) -> bool:
    """Say if transformers begins a text with the begin-of-text token: by the tokenizer's files, else by its kind."""
    folder = Path(chat.tokenizer.source_files[0]).parent
    config: Mapping[str, Any] = (
        read_json(folder / "tokenizer_config.json") if (folder / "tokenizer_config.json").is_file() else {}
    )
    if isinstance(config.get("add_bos_token"), bool):
        return config["add_bos_token"]
    if not (folder / "tokenizer.json").is_file():
        return chat.tokenizer.kind == "sentencepiece"
    from tokenizers import Tokenizer

    ids = Tokenizer.from_file(str(folder / "tokenizer.json")).encode("a").ids
    return ids[:1] == [chat.tokenizer.bos_id]
