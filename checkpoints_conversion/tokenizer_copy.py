"""The copy of the tokenizer in a checkpoint, so that a checkpoint needs no other files."""

from __future__ import annotations

import shutil
from collections.abc import Sequence
from pathlib import Path

from megatron_ft.checkpoints.folder import TOKENIZER_FOLDER, CheckpointConfig
from megatron_ft.data.template_files import read_object, template_sources, write_templates
from megatron_ft.data.tokenizer import Tokenizer, load_tokenizer
from megatron_ft.data.tokenizer_files import has_tokenizer
from megatron_ft.errors import CheckpointError
from megatron_ft.files import write_json


def load_before_and_after(
    path: Path | None, model_folder: Path, extra_tokens: Sequence[str]
) -> tuple[Tokenizer | None, Tokenizer | None]:
    """Return the tokenizer without and with the extra tokens. path: default the model folder's; (None, None) without one.

    Raise TokenizerError if a tokenizer is requested, or needed for extra tokens, and does not exist.
    """
    present = has_tokenizer(model_folder)
    if path is None and not present and not extra_tokens:
        return None, None
    source = path or model_folder
    return load_tokenizer(source), load_tokenizer(source, extra_tokens)


def copy_tokenizer(tokenizer: Tokenizer, checkpoint: Path) -> None:
    """Copy its files to checkpoint/tokenizer/ and record the added tokens there."""
    folder = checkpoint / TOKENIZER_FOLDER
    folder.mkdir()
    for file in tokenizer.source_files:
        # A SentencePiece model may have any name; in a folder it must be tokenizer.model.
        shutil.copyfile(file, folder / ("tokenizer.model" if file.suffix == ".model" else file.name))
    if model_type := read_object(tokenizer.source_files[0].parent / "config.json").get("model_type"):
        write_json(folder / "config.json", {"model_type": model_type})  # it decides which class reads the files
    write_templates(folder, template_sources(tokenizer.source_files[0].parent))
    write_json(folder / "added_tokens.json", tokenizer.added_tokens)
    copied = load_tokenizer(folder, list(tokenizer.added_tokens), tokenizer.fingerprint)
    if copied.fingerprint != tokenizer.fingerprint:
        raise RuntimeError(f"the copy of {tokenizer.source_files[0]} reads differently from the original")


def load_copy(checkpoint: Path, config: CheckpointConfig) -> Tokenizer | None:
    """Return the checkpoint's tokenizer, None if it has none. Raise CheckpointError if it is not the one in config.json."""
    if not config.tokenizer:
        return None
    folder = checkpoint / TOKENIZER_FOLDER
    recorded = config.tokenizer.get("fingerprint")
    tokenizer = load_tokenizer(folder, list(config.tokenizer.get("added_tokens", {})), recorded)
    if tokenizer.fingerprint != recorded:
        raise CheckpointError(f"{folder} is not the tokenizer recorded in config.json; restore the folder")
    return tokenizer


def original_templates(checkpoint: Path) -> dict[str, str]:
    """Return the chat templates of the source model by name, {} if it had none."""
    return template_sources(checkpoint / TOKENIZER_FOLDER)
