"""Writes a tokenizer as Hugging Face files, so that transformers gives the same ids as in training.

transformers reads tokenizer.json unchanged if tokenizer_config.json names no class of its own (PreTrainedTokenizerFast). A class such as
LlamaTokenizer would replace our rules for spaces. sentencepiece_export.py converts a SentencePiece model to tokenizer.json.
"""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from megatron_ft.data.fast_tokenizer import FastTokenizer
from megatron_ft.data.sentencepiece_model import SentencePieceModel
from megatron_ft.data.template_files import CONFIG, DEFAULT, in_config, read_object, token_name, write_templates
from megatron_ft.data.tokenizer import Tokenizer
from megatron_ft.files import write_json

NO_LIMIT = 1 << 62  # model_max_length for a tokenizer that sets none
PADDING = ("<PAD>", "<pad>", "[PAD]", "<|pad|>", "<|finetune_right_pad_id|>")
_NOT_CARRIED = {
    # of the class that it had, of the place where it lay
    *("tokenizer_class", "auto_map", "backend", "use_fast", "is_local", "name_or_path", "tokenizer_file", "vocab_file"),
    *(
        "merges_file",
        "special_tokens_map_file",
        "sp_model_kwargs",
        "legacy",
        "add_prefix_space",
        "spaces_between_special_tokens",
    ),
    # written anew
    *("bos_token", "eos_token", "unk_token", "pad_token", "added_tokens_decoder", "chat_template"),
}


def export_tokenizer(
    tokenizer: Tokenizer,
    folder: str | Path,
    chat_template: str | Mapping[str, str] | None = None,
    stop_token: str | None = None,
    model_max_length: int | None = None,
) -> None:
    """Write tokenizer.json, tokenizer_config.json, special_tokens_map.json, chat_template.jinja and, where there is
    one, tokenizer.model. Settings of the tokenizer's own tokenizer_config.json are kept.

    chat_template: Jinja, as ChatFormat.jinja gives it, or several by name. stop_token: becomes the end-of-sequence
    token, where generation stops.
    Raise TokenizerError for a SentencePiece model that tokenizer.json cannot express, or a stop token that is none
    of its tokens.
    """
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    templates = {DEFAULT: chat_template} if isinstance(chat_template, str) else chat_template or {}
    described = _describe(tokenizer)
    description = {**described, "added_tokens": _added_tokens(tokenizer, described.get("added_tokens", []))}
    names = special_names(tokenizer, stop_token)
    config = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "added_tokens_decoder": {
            str(t["id"]): {k: v for k, v in t.items() if k != "id"} for t in description["added_tokens"]
        },
        **names,
        "clean_up_tokenization_spaces": False,  # else decode("a ?") is "a?"
        "model_max_length": model_max_length or NO_LIMIT,
        "model_input_names": ["input_ids", "attention_mask"],
        **({"chat_template": in_config(templates)} if templates else {}),
    }
    config |= {key: value for key, value in _carried(tokenizer).items() if key not in config}
    write_json(folder / "tokenizer.json", description)
    write_json(folder / "tokenizer_config.json", config)
    write_json(folder / "special_tokens_map.json", names)
    write_templates(folder, templates)
    if isinstance(tokenizer.backend, SentencePieceModel):
        tokenizer.backend.write(folder / "tokenizer.model")


def _carried(tokenizer: Tokenizer) -> dict[str, Any]:
    """Return the settings of the tokenizer's tokenizer_config.json that do not depend on its class, such as padding_side."""
    found = _own_config(tokenizer)
    return {key: value for key, value in found.items() if key not in _NOT_CARRIED and not key.startswith("_")}


def _own_config(tokenizer: Tokenizer) -> dict[str, Any]:
    own = next((file for file in tokenizer.source_files if file.name == CONFIG), None)
    return read_object(own) if own else {}


def _describe(tokenizer: Tokenizer) -> dict[str, Any]:
    if isinstance(tokenizer.backend, SentencePieceModel):
        return tokenizer.backend.as_json()
    assert isinstance(tokenizer.backend, FastTokenizer)
    # As read, but without padding and cutting, which would change ids without notice.
    return {**json.loads(json.dumps(tokenizer.backend.description)), "padding": None, "truncation": None}


def _added_tokens(tokenizer: Tokenizer, existing: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Return the added_tokens of tokenizer.json, by id: unchanged from the file that was read, then ours."""
    tokens = {entry["content"]: entry for entry in existing}
    for name, index in tokenizer.special_tokens.items():
        flags = dict.fromkeys(("single_word", "lstrip", "rstrip", "normalized"), False)
        if not tokens.get(name, {}).get("special"):
            tokens[name] = {"id": index, "content": name, **flags, "special": True}
    return sorted(tokens.values(), key=lambda token: token["id"])


def special_names(tokenizer: Tokenizer, stop_token: str | None) -> dict[str, str]:
    """Return bos_token, eos_token, unk_token and pad_token, if the tokenizer has them. Training and serving need a padding token."""
    names: dict[int | None, str] = {index: name for name, index in tokenizer.special_tokens.items()}
    if stop_token is not None:
        tokenizer.token_id(stop_token)  # raises where it is missing
    found = {
        "bos_token": names.get(tokenizer.bos_id),
        "eos_token": stop_token or names.get(tokenizer.eos_id),
        "unk_token": "<unk>" if "<unk>" in tokenizer.special_tokens else None,
    }
    found["pad_token"] = _pad_token(tokenizer, names.get(tokenizer.eos_id), found["eos_token"])
    return {key: name for key, name in found.items() if name is not None}


def _pad_token(tokenizer: Tokenizer, old_end: str | None, end: str | None) -> str | None:
    """Return the tokenizer's own padding token, else one with such a name, else the old end token, <unk>, or the end token."""
    own = token_name(_own_config(tokenizer).get("pad_token"))
    ways = (own, *PADDING, old_end if old_end != end else None, "<unk>", end)
    return next((name for name in ways if name in tokenizer.special_tokens), None)
