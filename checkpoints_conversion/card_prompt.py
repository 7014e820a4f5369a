"""The section of a model card about prompts: a conversation as the model reads it, rendered by the export's own template."""

from __future__ import annotations

from typing import Any

from checkpoints_conversion.exported_words import spoken
from megatron_ft.checkpoints.folder import CheckpointConfig
from megatron_ft.data.chat_format import ChatFormat
from megatron_ft.data.tokenizer import Tokenizer
from megatron_ft.errors import ConfigError, DataError

QUESTION = "What colour is a plum?"


def prompt_messages(system: str | None) -> list[dict[str, str]]:
    """Return the messages of the card's examples."""
    return [*([{"role": "system", "content": system}] if system else []), {"role": "user", "content": QUESTION}]


def prompt_section(config: CheckpointConfig, tokenizer: Tokenizer | None, system: str | None) -> str:
    """Return Markdown, "" without a template. system: the recommended system message. Raise ConfigError if the template refuses it."""
    chat_format = spoken(config, tokenizer)
    if chat_format is None:
        if system:
            raise ConfigError(
                "--system: the model has no chat format, so there is no place for a system message: drop it"
            )
        return ""
    try:
        text = chat_format.text(prompt_messages(system), add_generation_prompt=True)
    except DataError as error:
        if not system:
            return ""
        raise ConfigError(f"--system: the chat template takes no such message ({error}): drop it") from error
    lines = [
        "## Prompt format",
        f"The tokenizer's template writes this, and an answer ends at `{chat_format.stop_token}`:",
        fenced(text),
    ]
    if said := system or _default(chat_format):
        how = "The recommended system message" if system else "Without a system message the template takes this one"
        lines.append(f"{how}:\n\n{fenced(said)}")
    return "\n\n".join(lines)


def _default(chat_format: Any) -> str | None:
    return chat_format.default_system if isinstance(chat_format, ChatFormat) else None


def fenced(text: str) -> str:
    """Return a text as a block of code, whatever it contains."""
    fence = "```"
    while fence in text:
        fence += "`"
    return f"{fence}text\n{text}\n{fence}"
