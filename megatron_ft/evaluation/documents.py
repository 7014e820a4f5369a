"""What perplexity is measured on: samples of shards and text files, as documents of one tokenizer's ids."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import numpy as np

from megatron_ft.data.manifest import check_tokenizer, manifest_path
from megatron_ft.data.shards import Shards, open_shards
from megatron_ft.data.tokenizer import Tokenizer
from megatron_ft.errors import DataError
from megatron_ft.evaluation.perplexity import Document
from megatron_ft.files import read_text


def read_documents(places: Sequence[str], tokenizer: Tokenizer, vocab_size: int) -> list[Document]:
    """Return the documents of prefixes of shards and of text files. Raise DataError for a missing or empty one."""
    documents = [one for place in places for one in _read(place, tokenizer, vocab_size)]
    if not any(len(one.ids) > 1 for one in documents):
        raise DataError(f"{', '.join(places)}: no document has two tokens, so nothing can be scored; give longer texts")
    return documents


def _read(place: str, tokenizer: Tokenizer, vocab_size: int) -> list[Document]:
    if manifest_path(place).is_file():
        return _of_shards(open_shards(place), tokenizer, vocab_size)
    if not Path(place).is_file():
        raise DataError(f"--data {place}: neither a text file nor the prefix of shards; check the path")
    return [Document(tokenizer.encode(read_text(place)), Path(place).name)]


def _of_shards(shards: Shards, tokenizer: Tokenizer, vocab_size: int) -> list[Document]:
    check_tokenizer(shards.manifest, tokenizer.info(), vocab_size, shards.prefix)
    names = _sources(shards)
    return [Document(shards.tokens(i), names[i], shards.role_bytes(i)) for i in range(len(shards))]


def _sources(shards: Shards) -> np.ndarray:
    """Return the name of each sample's source; without sources that of the shards."""
    names = np.full(len(shards), Path(shards.prefix).name, dtype=object)
    for source in shards.manifest.sources:
        names[slice(*source["documents"])] = source["name"]
    return names
