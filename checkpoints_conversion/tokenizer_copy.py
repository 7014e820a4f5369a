"""The tokenizer's copy inside a checkpoint, so that whoever has the checkpoint needs no other file."""

from __future__ import annotations

import shutil
from collections.abc import Sequence
from pathlib import Path

from megatron_ft.checkpoints.folder import TOKENIZER_FOLDER, CheckpointConfig
from megatron_ft.data.chat_template import template_source
from megatron_ft.data.tokenizer import Tokenizer, load_tokenizer
from megatron_ft.errors import CheckpointError
from megatron_ft.files import write_json

_TEMPLATE = "chat_template.jinja"


def load_before_and_after(
    path: Path | None, model_folder: Path, extra_tokens: Sequence[str]
) -> tuple[Tokenizer | None, Tokenizer | None]:
    """The tokenizer as it is, and with the extra tokens. path: default the model folder's; (None, None) without one.

    Raises TokenizerError when a tokenizer is needed (extra tokens) or asked for, and not there.
    """
    present = any((model_folder / name).is_file() for name in ("tokenizer.json", "tokenizer.model"))
    if path is None and not present and not extra_tokens:
        return None, None
    source = path or model_folder
    return load_tokenizer(source), load_tokenizer(source, extra_tokens)


def copy_tokenizer(tokenizer: Tokenizer, checkpoint: Path) -> None:
    """Copy its files to checkpoint/tokenizer/ and name there the tokens that were added."""
    folder = checkpoint / TOKENIZER_FOLDER
    folder.mkdir()
    for file in tokenizer.source_files:
        # A SentencePiece model may have any name of its own; in a folder it is found as tokenizer.model.
        shutil.copyfile(file, folder / ("tokenizer.model" if file.suffix == ".model" else file.name))
    if template := template_source(tokenizer.source_files[0].parent):
        (folder / _TEMPLATE).write_text(template, encoding="utf-8")
    write_json(folder / "added_tokens.json", tokenizer.added_tokens)
    if load_tokenizer(folder, list(tokenizer.added_tokens)).fingerprint != tokenizer.fingerprint:
        raise RuntimeError(f"the copy of {tokenizer.source_files[0]} reads differently from the original")


def load_copy(checkpoint: Path, config: CheckpointConfig) -> Tokenizer | None:
    """The checkpoint's tokenizer; None if made without. Raises CheckpointError if it is not what config.json names."""
    if not config.tokenizer:
        return None
    folder = checkpoint / TOKENIZER_FOLDER
    tokenizer = load_tokenizer(folder, list(config.tokenizer.get("added_tokens", {})))
    if tokenizer.fingerprint != config.tokenizer.get("fingerprint"):
        raise CheckpointError(f"{folder} is not the tokenizer that config.json names; restore the folder")
    return tokenizer


def original_template(checkpoint: Path) -> str | None:
    """The chat template that came with the source model, if any."""
    return template_source(checkpoint / TOKENIZER_FOLDER)
