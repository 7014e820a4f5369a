"""The tokenizer of an export, and the entries of its config files that name tokens."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from checkpoints_conversion.megatron_source import Opened
from checkpoints_conversion.tokenizer_copy import original_templates
from megatron_ft.checkpoints.folder import CheckpointConfig
from megatron_ft.data.chat_format import get_format
from megatron_ft.data.chat_template import NoTemplate, own_template, today
from megatron_ft.data.tokenizer import Tokenizer
from megatron_ft.data.tokenizer_export import export_tokenizer, special_names
from megatron_ft.errors import DataError, TokenizerError
from megatron_ft.files import write_json
from megatron_ft.log import logger


def write_words(source: Opened, export: Path, hf_config: dict | None) -> None:
    """Write the tokenizer, and with hf_config also config.json and generation_config.json, which name its tokens."""
    config, tokenizer = source.config, source.tokenizer
    chat_format = spoken(config, tokenizer)
    names = special_names(tokenizer, chat_format.stop_token if chat_format else None) if tokenizer else {}
    ids = {key: tokenizer.token_id(name) for key, name in names.items()} if tokenizer else {}
    if hf_config is not None:
        stop_id = ids.get("eos_token") if chat_format else None
        own, generation = _configs(hf_config, stop_id, ids.get("pad_token"))
        write_json(export / "config.json", own)
        write_json(export / "generation_config.json", generation)
    if tokenizer is not None:
        _export_tokenizer(export, source.folder, config, tokenizer, chat_format, names)


def _configs(hf_config: dict, stop_id: int | None, pad_id: int | None) -> tuple[dict, dict]:
    """Return config.json and generation_config.json. Generation ends at the format's stop token and at the model's own."""
    generation = dict(hf_config.pop("generation_config", {}))
    for key in ("bos_token_id", "eos_token_id", "pad_token_id"):
        if hf_config.get(key) is not None:
            generation.setdefault(key, hf_config[key])
    if stop_id is not None:
        generation["eos_token_id"] = _first(stop_id, generation.get("eos_token_id"))
        ends = hf_config.get("eos_token_id")
        hf_config["eos_token_id"] = _first(stop_id, ends) if isinstance(ends, list) else stop_id
    if pad_id is not None:
        generation["pad_token_id"] = hf_config["pad_token_id"] = pad_id
    return hf_config, generation


def _first(stop_id: int, others: int | list[int] | None) -> list[int]:
    others = others if isinstance(others, list) else [] if others is None else [others]
    return [stop_id, *(index for index in others if index != stop_id)]


def spoken(config: CheckpointConfig, tokenizer: Tokenizer | None) -> Any:
    """Return the recorded chat format, else the template of the tokenizer, None without one that says where answers end."""
    if tokenizer is None or config.chat_format:
        return get_format(config.chat_format) if config.chat_format else None
    try:
        return own_template(tokenizer, today())
    except NoTemplate:
        return None
    except (TokenizerError, DataError) as error:
        logger("conversion").warning(
            "the stop token of the chat template is unknown, the model's own is kept: %s", error
        )
        return None


def _export_tokenizer(
    export: Path, folder: Path, config: CheckpointConfig, tokenizer: Tokenizer, chat_format: Any, names: dict[str, str]
) -> None:
    export_tokenizer(
        tokenizer,
        export,
        chat_template=chat_format.exported if chat_format else original_templates(folder),
        stop_token=names.get("eos_token"),
        model_max_length=config.architecture.max_position_embeddings,
    )
