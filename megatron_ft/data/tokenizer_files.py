"""Finds the files of a tokenizer and the tokens added to its vocabulary.

A folder in Hugging Face's layout has tokenizer.json or tokenizer.model (SentencePiece). Added tokens are in tokenizer.json,
added_tokens.json or tokenizer_config.json, depending on its age.
"""

import json
import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from megatron_ft.data import tokenizer_spaces
from megatron_ft.data.fast_tokenizer import CONVERT
from megatron_ft.data.fingerprint import fingerprint
from megatron_ft.data.template_files import named_tokens
from megatron_ft.errors import TokenizerError

__all__ = ["TokenizerFiles", "find", "fingerprint"]
OTHER_KINDS = (
    "tekken.json",
    "tiktoken.model",
    "spiece.model",
    "sentencepiece.bpe.model",
    "merges.txt",
    "vocab.txt",
    "vocab.json",
)


@dataclass
class TokenizerFiles:
    """model or description is there, or both. config: tokenizer_config.json ({} without one)."""

    files: list[Path]
    model: Any  # SentencePieceModel | None
    description: dict[str, Any] | None
    config: dict[str, Any]
    added: dict[str, Any]
    model_type: str | None = None  # of a config.json beside them

    def backend(self) -> Any:
        """Return the base vocabulary; of two that agree, also on spaces, the SentencePiece model."""
        from megatron_ft.data.fast_tokenizer import FastTokenizer

        rule = tokenizer_spaces.rule_of_class(self.config, self.description, self.model_type)
        if rule is not None:
            description = self.description or _said_as_json(self.model)
            return FastTokenizer(self.files[0], tokenizer_spaces.with_rule(description, rule))
        if self.model is not None and (self.description is None or self._agree()):
            return self.model
        return FastTokenizer(self.files[0], self.description or {})

    def earlier_backend(self) -> Any:
        """Return the base vocabulary as earlier releases chose it, without regard to spaces."""
        from megatron_ft.data.fast_tokenizer import FastTokenizer

        if self.model is not None and (self.description is None or _have_the_same_pieces(self.model, self.description)):
            return self.model
        return FastTokenizer(self.files[0], self.description or {})

    def _agree(self) -> bool:
        from megatron_ft.data.sentencepiece_export import normalizer

        if self.description is None or not _have_the_same_pieces(self.model, self.description):
            return False
        return tokenizer_spaces.are_before_each_text(self.description, normalizer(self.model.proto()))

    def added_tokens(self) -> dict[str, int]:
        """Return name -> id. If the files differ, the newest kind of file is used, as in transformers."""
        tokens = dict(self.added)
        decoder = self.config.get("added_tokens_decoder", {})
        tokens |= {entry["content"]: int(index) for index, entry in decoder.items()}
        # Added tokens that are not special are matched in text on purpose (for instance runs of spaces): not ours to
        # reserve.
        listed = (self.description or {}).get("added_tokens", [])
        tokens |= {entry["content"]: entry["id"] for entry in listed}
        plain = {entry["content"] for entry in [*decoder.values(), *listed] if not entry.get("special")}
        return {name: index for name, index in tokens.items() if name not in plain}

    def ends(self) -> tuple[str | None, str | None]:
        """Return the names of the tokens that begin and end a document, if the files contain them."""
        inner = (self.model.bos, self.model.eos) if self.model is not None else (None, None)
        named = named_tokens(self.files[0].parent) if self.config else {}
        bos, eos = (_name(self.config.get(key)) or named.get(key) for key in ("bos_token", "eos_token"))
        return inner[0] or bos, inner[1] or eos


def has_tokenizer(folder: Path) -> bool:
    """Return whether a model's folder holds a tokenizer that is read; one that is written by a program may have none."""
    return bool(_those_in(folder))


def _those_in(folder: Path) -> list[str]:
    return [name for name in ("tokenizer.json", "tokenizer.model") if (folder / name).is_file()]


def find(path: Path) -> TokenizerFiles:
    """Read the files at a path. Raise TokenizerError with the names of the expected files."""
    from megatron_ft.data.fast_tokenizer import read_description

    if not path.exists():
        raise TokenizerError(
            f"{path}: no such tokenizer; give a tokenizer.model, a tokenizer.json or a folder with one of them"
        )
    if path.suffix == ".tiktoken":
        raise TokenizerError(f"{path}: of a kind that is not read; {CONVERT}")
    if path.is_file():
        is_json = path.suffix == ".json"
        return TokenizerFiles(
            [path], None if is_json else _model(path), read_description(path) if is_json else None, {}, {}
        )
    names = _those_in(path)
    if not names:
        raise TokenizerError(f"{path}: holds neither tokenizer.json nor tokenizer.model{_other_kind(path)}")
    description = read_description(path / "tokenizer.json") if "tokenizer.json" in names else None
    model = _model(path / "tokenizer.model", needed=description is None) if "tokenizer.model" in names else None
    extra = [
        name
        for name in ("tokenizer_config.json", "added_tokens.json", "special_tokens_map.json")
        if (path / name).is_file()
    ]
    return TokenizerFiles(
        [path / name for name in names + extra],
        model,
        description,
        _read(path / "tokenizer_config.json"),
        _read(path / "added_tokens.json"),
        _read(path / "config.json").get("model_type"),
    )


def _other_kind(folder: Path) -> str:
    """Return the rest of an error: what a folder holds in the place of the files that are read, and what to do."""
    names = sorted(file.name for file in folder.iterdir())
    numbered = next((name for name in names if re.match(r"tokenizer\.model\.v\d", name)), None)
    if numbered:
        return f", but {numbered}; give that file itself"
    found = next((name for name in names if name in OTHER_KINDS or name.endswith(".tiktoken")), None)
    return f", but {found}; {CONVERT}" if found else "; give the tokenizer's own folder"


def _model(path: Path, needed: bool = True) -> Any:
    """Return the SentencePiece model in a file; None for another format with the same name (tiktoken's) if it is not needed."""
    from megatron_ft.data.sentencepiece_model import SentencePieceModel

    try:
        return SentencePieceModel(path)
    except TokenizerError:
        if needed:
            raise
        return None


def _said_as_json(model: Any) -> dict[str, Any]:
    """Return a SentencePiece model as a tokenizer.json for with_rule. As in transformers, its own pieces are added tokens: controls, and
    user-defined ones, which text may spell."""
    flags = {"single_word": False, "lstrip": False, "rstrip": False, "normalized": False, "special": True}
    added = [{"id": index, "content": name, **flags} for name, index in model.controls.items()]
    described = model.as_json(own_spaces=False)
    return {**described, "added_tokens": described["added_tokens"] + added}


def _have_the_same_pieces(model: Any, description: dict[str, Any]) -> bool:
    vocabulary = description["model"].get("vocab")
    if isinstance(vocabulary, list):  # Unigram: [piece, score] in the order of ids
        return [piece for piece, _ in vocabulary] == model.pieces()
    return vocabulary == {piece: index for index, piece in enumerate(model.pieces())}


def _read(path: Path) -> dict[str, Any]:
    if not path.is_file():
        return {}
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise TokenizerError(f"{path}: not valid JSON ({error}); is it the whole file?") from error
    if not isinstance(value, dict):
        raise TokenizerError(f"{path}: should hold a JSON object; is it the right file?")
    return value


def _name(token: Any) -> str | None:
    """Return the name of a token in tokenizer_config.json, which is a text or an object with the text."""
    return token.get("content") if isinstance(token, dict) else token
