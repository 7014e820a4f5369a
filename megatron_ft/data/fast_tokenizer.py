"""A Hugging Face tokenizer.json as the base vocabulary of a tokenizer.

There are two copies: one encodes the text at the start of a document, the other the text after a control token. They differ only for
tokenizers that put a space before the first word of a document and nowhere else. tokenizer_files.py reads tokenizer_config.json.
"""

import copy
import json
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import orjson

from megatron_ft.data import bulk
from megatron_ft.data.fingerprint import fingerprint
from megatron_ft.errors import TokenizerError, half_a_character

CONVERT = "write a tokenizer.json of it: transformers.AutoTokenizer.from_pretrained(FOLDER).save_pretrained(FOLDER), and give that folder"


class FastTokenizer:
    """See tokenizer.Backend. `description` is the parsed tokenizer.json."""

    kind = "huggingface"
    threads = 0  # the library's setting, from TOKENIZERS_PARALLELISM

    def __init__(self, path: Path, description: dict[str, Any]):
        self.path, self.description = path, description
        # Padding, truncation and automatic special tokens are settings of the caller of the tokenizer.
        self._plain = plain = {**description, "padding": None, "truncation": None, "post_processor": None}
        behind = _behind_a_token(plain)
        self._start = _build(path, plain)
        self._behind = self._start if behind == plain else _build(path, behind)
        self.size = self._start.get_vocab_size(with_added_tokens=False)
        # Added tokens that are not special are found in text, as words of the vocabulary are, and may lie above it.
        self.highest = max(
            [self.size - 1, *(t["id"] for t in description.get("added_tokens", []) if not t.get("special"))]
        )
        self.controls = {
            t["content"]: t["id"]
            for t in description.get("added_tokens", [])
            if t.get("special") and t["id"] < self.size
        }
        self.fingerprint = fingerprint(_essence(description))
        self._reserved: set[str] = set()
        self._bulk: dict[bool, bulk.Bulk] = {}  # by whether text is at the start

    def encode_batch(self, texts: list[str], at_start: bool) -> list[np.ndarray]:
        if self._bulk:
            try:
                return self._bulk[at_start].encode(texts)
            except bulk.Failed:
                self._bulk = {}
        return self._by_reference(texts, at_start)

    def hasten(self, texts: Sequence[str]) -> bool:
        """See tokenizer.Tokenizer.hasten."""
        added = self.description.get("added_tokens", [])
        in_text = [token for token in added if not token.get("special") and token["content"] not in self._reserved]
        start = {**self._plain, "added_tokens": in_text}
        behind = _behind_a_token(start)
        first = bulk.agreeing(start, partial(self._by_reference, at_start=True), texts)
        later = first if behind == start else bulk.agreeing(behind, partial(self._by_reference, at_start=False), texts)
        self._bulk = {True: first, False: later} if first and later else {}
        return bool(self._bulk)

    def _by_reference(self, texts: list[str], at_start: bool) -> list[np.ndarray]:
        found = self._encode(texts, at_start, "encode_batch_fast")
        return [np.array(encoding.ids, dtype=np.int32) for encoding in found]

    def starts(self, texts: list[str], at_start: bool) -> list[tuple[np.ndarray, np.ndarray, bool]]:
        """Return (ids, the character of the text at which each token begins, False) of each text."""
        found = self._encode(texts, at_start, "encode_batch")
        return [
            (np.array(one.ids, np.int32), np.array([start for start, _ in one.offsets], np.int64), False)
            for one in found
        ]

    def _encode(self, texts: list[str], at_start: bool, method: str) -> Any:
        try:
            return getattr(self._start if at_start else self._behind, method)(texts, add_special_tokens=False)
        except (
            UnicodeEncodeError,
            TypeError,
        ) as error:  # a TypeError "must be str": the binding's error for a lone surrogate
            raise half_a_character() from error

    def decode(self, ids: list[int]) -> str:
        return self._start.decode(ids, skip_special_tokens=False) if ids else ""

    def piece(self, index: int) -> str:
        return self._start.id_to_token(index) or ""

    def find(self, piece: str) -> int | None:
        return self._start.token_to_id(piece)

    def reserve(self, tokens: dict[str, int]) -> None:
        """Make these tokens impossible in text: special ones are not searched for in text.

        Raise TokenizerError if a token has another id than in the file, or is an ordinary word of the vocabulary.
        """
        from tokenizers import AddedToken

        for model in (self._start, self._behind):
            model.encode_special_tokens = True
            # All at once: each call builds the search for all of them again.
            model.add_special_tokens([AddedToken(name, special=True, normalized=False) for name in tokens])
            for name, index in tokens.items():
                if (got := model.token_to_id(name)) != index:
                    raise TokenizerError(
                        f"{self.path}: '{name}' has id {got} in tokenizer.json and {index} beside it; repair the files"
                    )
                if index in model.encode(name, add_special_tokens=False).ids:
                    raise TokenizerError(
                        f"{self.path}: '{name}' is an ordinary word of this vocabulary; choose another special token"
                    )
        self._reserved.update(tokens)
        self._bulk = {}


def read_description(path: Path) -> dict[str, Any]:
    """Return the parsed tokenizer.json. Raise TokenizerError if it is invalid."""
    try:
        description = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise TokenizerError(f"{path}: not a readable tokenizer.json ({error}); is it the whole file?") from error
    if isinstance(description, dict) and {"config", "vocab"} <= description.keys() and "model" not in description:
        raise TokenizerError(f"{path}: a tekken.json of mistral-common, not a tokenizer.json; {CONVERT}")
    if not isinstance(description, dict) or not isinstance(description.get("model"), dict):
        raise TokenizerError(
            f"{path}: not a tokenizer.json (no 'model' in it); give a fast tokenizer's file, or its folder"
        )
    return description


def _build(path: Path, description: dict[str, Any]) -> Any:
    import tokenizers

    try:
        return tokenizers.Tokenizer.from_str(orjson.dumps(description).decode())
    except Exception as error:  # the binding raises bare Exception
        raise TokenizerError(f"{path}: tokenizers cannot read it ({error})") from error


def _behind_a_token(description: dict[str, Any]) -> dict[str, Any]:
    """Return the tokenizer for text after a control token: there a Metaspace that prepends to the "first" text does nothing."""
    result = copy.deepcopy({"pre_tokenizer": description.get("pre_tokenizer")})
    step = result["pre_tokenizer"] or {}
    for part in step.get("pretokenizers", [step]):
        if part.get("type") == "Metaspace" and part.get("prepend_scheme") == "first":
            part["prepend_scheme"] = "never"
    return {**description, **result}


def _essence(description: dict[str, Any]) -> list[Any]:
    """Return what decides the ids, in a form that another version rewriting the file does not change."""
    model = {key: value for key, value in description["model"].items() if value not in (None, False)}
    if "merges" in model:
        model["merges"] = [m.split(" ") if isinstance(m, str) else m for m in model["merges"]]
    return [model, description.get("normalizer"), description.get("pre_tokenizer")]
