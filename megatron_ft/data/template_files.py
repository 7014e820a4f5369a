"""The chat templates (Jinja) among a tokenizer's files, and the tokens that templates name.

A tokenizer has one template, or several by name, of which transformers takes "tool_use" for a chat with tools and "default" else.
"""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from megatron_ft.errors import TokenizerError
from megatron_ft.files import read_text

DEFAULT, TOOLS = "default", "tool_use"
FILE, FOLDER = "chat_template.jinja", "additional_chat_templates"
CONFIG, TOKENS = "tokenizer_config.json", "special_tokens_map.json"


def template_sources(folder: Path) -> dict[str, str]:
    """Return name -> source of every chat template in a folder; {} without one.

    Places, in transformers' order: files (chat_template.jinja is the default one), tokenizer_config.json, chat_template.json.
    """
    found = {path.stem: read_text(path) for path in sorted((folder / FOLDER).glob("*.jinja"))}
    if (folder / FILE).is_file():
        found = {DEFAULT: read_text(folder / FILE), **found}
    for name in (CONFIG, "chat_template.json"):
        found = found or _by_name(read_object(folder / name).get("chat_template"))
    return found


def template_source(folder: Path) -> str | None:
    """Return the default template among a tokenizer's files, None without one."""
    return template_sources(folder).get(DEFAULT)


def write_templates(folder: Path, sources: Mapping[str, str]) -> None:
    """Write templates as transformers does: one file for the default one, a folder for the others."""
    for name, source in sources.items():
        path = folder / FILE if name == DEFAULT else folder / FOLDER / f"{name}.jinja"
        path.parent.mkdir(exist_ok=True)
        path.write_text(source, encoding="utf-8")


def in_config(sources: Mapping[str, str]) -> Any:
    """Return the templates as tokenizer_config.json holds them."""
    if set(sources) <= {DEFAULT}:
        return sources.get(DEFAULT)
    return [{"name": name, "template": source} for name, source in sources.items()]


def named_tokens(folder: Path) -> dict[str, str]:
    """Return the tokens that a template can name, such as bos_token, as transformers does: from tokenizer_config.json; if that has no
    added_tokens_decoder, as in older files, from special_tokens_map.json first; else those of the class.
    """
    config = read_object(folder / CONFIG)
    files = [config] if "added_tokens_decoder" in config else [config, read_object(folder / TOKENS)]
    named = str(config.get("tokenizer_class") or "").removesuffix("Fast")
    result = {"unk_token": "<unk>", "bos_token": "<s>", "eos_token": "</s>"} if named == "LlamaTokenizer" else {}
    for content in files:
        extra = content.get("extra_special_tokens")
        own = {key: value for key, value in content.items() if key.endswith("_token")}
        for entries in (own, extra if isinstance(extra, dict) else {}):
            found = {key: token_name(value) for key, value in entries.items()}
            result |= {key: name for key, name in found.items() if name is not None}
    return result


def token_name(token: Any) -> str | None:
    """Return a token's text; files contain it as a string or in an object."""
    return token.get("content") if isinstance(token, dict) else token if isinstance(token, str) else None


def read_object(path: Path) -> dict[str, Any]:
    """Return the JSON object in a file, {} without one."""
    try:
        value = json.loads(path.read_text(encoding="utf-8")) if path.is_file() else {}
    except ValueError as error:
        raise TokenizerError(f"{path}: not valid JSON ({error}); is it the whole file?") from error
    return value if isinstance(value, dict) else {}


def _by_name(found: Any) -> dict[str, str]:
    """tokenizer_config.json has one template, or several by name, as a list or an object."""
    if isinstance(found, str):
        return {DEFAULT: found}
    if isinstance(found, dict):
        return {name: source for name, source in found.items() if isinstance(source, str)}
    entries = [entry for entry in found if isinstance(entry, dict)] if isinstance(found, list) else []
    sources = {str(entry.get("name")): entry.get("template") for entry in entries}
    return {name: source for name, source in sources.items() if isinstance(source, str)}
