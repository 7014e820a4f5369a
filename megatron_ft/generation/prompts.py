"""Files of prompts: one JSON object per line, a text or a conversation. Without torch, so that mistakes are found at once."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from megatron_ft.errors import DataError


def read_prompt_file(path: Path) -> list[dict[str, Any]]:
    """Return every prompt as an object with the key "messages". Raise DataError with file and line."""
    try:
        text = path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise DataError(f"{path}: cannot be read ({error}); give a UTF-8 file of JSON lines") from error
    numbered = [(number, line) for number, line in enumerate(text.splitlines(), 1) if line.strip()]
    if not numbered:
        raise DataError(f"{path}: contains no prompts; write one JSON object per line")
    return [_parse_line(line, f"{path}, line {number}") for number, line in numbered]


def read_references(path: Path) -> list[dict[str, Any]]:
    """Return every prompt, whose "answer", where there is one, is the text that a model should answer. Raise DataError."""
    prompts = read_prompt_file(path)
    for number, prompt in enumerate(prompts, 1):
        if not isinstance(prompt.get("answer", ""), str):
            raise DataError(f'{path}, prompt {number}: "answer" must be a text, the answer to compare with')
        if not all(_is_message(message) for message in prompt["messages"]):
            raise DataError(f'{path}, prompt {number}: each message needs {{"role": text, "content": text}}')
    return prompts


def _is_message(message: object) -> bool:
    return isinstance(message, dict) and all(isinstance(message.get(key), str) for key in ("role", "content"))


def _parse_line(line: str, where: str) -> dict[str, Any]:
    try:
        return with_messages(json.loads(line), where)
    except json.JSONDecodeError as error:
        raise DataError(f"{where}: not valid JSON ({error.msg} at column {error.colno})") from error


def with_messages(entry: object, where: str) -> dict[str, Any]:
    """Return a prompt with the key "messages". where: what the error of another object names."""
    if isinstance(entry, dict) and isinstance(entry.get("messages"), list) and entry["messages"]:
        return entry
    if isinstance(entry, dict) and isinstance(entry.get("prompt"), str):
        return {**entry, "messages": [{"role": "user", "content": entry["prompt"]}]}
    raise DataError(f'{where}: needs {{"prompt": text}} or {{"messages": [...]}}')
