"""The tokenizer of all modules: plain text to ids and back, and the added (control) tokens by name.

Text and control tokens are separate: `encode` never returns a control token, whatever the text; a chat format inserts control tokens by
id. It adds no beginning or end of sequence. Chat formats are in other modules.

There are two kinds: a SentencePiece model (sentencepiece_model.py) and a Hugging Face tokenizer.json (fast_tokenizer.py).
"""

from collections.abc import Sequence
from pathlib import Path
from typing import Any, Protocol

import numpy as np

from megatron_ft.config.hints import alternatives
from megatron_ft.data import tokenizer_files
from megatron_ft.errors import TokenizerError

# Tokens that Megatron-LM and Megatron-LLM add to a SentencePiece vocabulary before those of the user.
MEGATRON_TOKENS = ("<CLS>", "<SEP>", "<EOD>", "<MASK>", "<PAD>")
# Names in Megatron-LLM's configurations. Only the first adds tokens; the kind is determined from the file.
TOKENIZER_TYPES = ("SentencePieceTokenizer", "FalconTokenizer", "HuggingFaceTokenizer", "PretrainedFromHF")


class Backend(Protocol):
    """The common interface of both kinds of tokenizer; ids are those of the base vocabulary."""

    kind: str
    size: int
    highest: int  # id that a text may have; above the vocabulary where text has added tokens of its own
    controls: dict[str, int]  # control tokens inside the base vocabulary, such as <s>
    fingerprint: str

    threads: int  # for a batch

    def encode_batch(self, texts: list[str], at_start: bool) -> list[np.ndarray]: ...
    def hasten(self, texts: Sequence[str]) -> bool: ...
    def starts(self, texts: list[str], at_start: bool) -> list[tuple[np.ndarray, np.ndarray, bool]]: ...
    def decode(self, ids: list[int]) -> str: ...
    def piece(self, index: int) -> str: ...
    def find(self, piece: str) -> int | None: ...
    def reserve(self, tokens: dict[str, int]) -> None: ...


class Tokenizer:
    """Ids are int32. added_tokens: name -> id of those that text cannot spell, besides the model's own controls."""

    def __init__(
        self, backend: Backend, added_tokens: dict[str, int], bos: str | None, eos: str | None, files: list[Path]
    ):
        self.backend, self.added_tokens, self.source_files = backend, dict(added_tokens), files
        backend.reserve(self.added_tokens)
        self.kind = backend.kind
        self.base_vocab_size = backend.size
        self.vocab_size = max([backend.highest, *self.added_tokens.values()]) + 1
        self._special = {**backend.controls, **self.added_tokens}
        listed = getattr(backend, "description", {}).get("added_tokens", [])
        # Tokens that text may spell, which a template may name all the same.
        self._matched = {token["content"]: token["id"] for token in listed if token["content"] not in self._special}
        self._names = {index: name for name, index in self._special.items()}
        self._controls = {name: np.array([index], np.int32) for name, index in self._special.items()}
        self._literals: dict[tuple[str, bool], np.ndarray] = {}
        self.bos_id, self.eos_id = self._special.get(bos or ""), self._special.get(eos or "")

    def encode(self, text: str, at_start: bool = True) -> np.ndarray:
        """Return the ids of a text, int32 [tokens]. Names of tokens in it remain ordinary text. See encode_batch for at_start."""
        return self.encode_batch([text], at_start)[0]

    def encode_batch(self, texts: Sequence[str], at_start: bool = True) -> list[np.ndarray]:
        """Return the ids of each text, using all cores.

        at_start: False if a control token precedes the text. It matters only for tokenizers that put a space before the first word of a
        document; SentencePiece puts one before every text. Raise TokenizerError for text that is not valid Unicode (a lone surrogate).
        """
        return self.backend.encode_batch(list(texts), at_start)

    def hasten(self, texts: Sequence[str] = ()) -> bool:
        """Encode with gigatoken from now on, if it gives the reference's ids for hard texts and for these. Return whether."""
        return self.backend.hasten(texts)

    def encode_cut(self, runs: Sequence[Sequence[str]], at_start: bool = True) -> list[list[np.ndarray]]:
        """Return the ids of texts given in parts. Each run is tokenized as one text; a token belongs to the part in which it begins."""
        result = []
        whole = self.backend.starts(["".join(parts) for parts in runs], at_start) if runs else []
        for parts, (ids, starts, in_bytes) in zip(runs, whole, strict=True):
            sizes = [len(part.encode()) if in_bytes else len(part) for part in parts[:-1]]
            result.append(np.split(ids, np.searchsorted(starts, np.cumsum(sizes), side="left")))
        return result

    def literal(self, text: str, at_start: bool = True) -> np.ndarray:
        """Return the ids of a short text that occurs often, from a cache. Not to be changed."""
        if (text, at_start) not in self._literals:
            self._literals[text, at_start] = self.encode(text, at_start)
        return self._literals[text, at_start]

    def control(self, token: str) -> np.ndarray:
        """Return a control token as ids, int32 [1]. Raise TokenizerError if there is none of that name."""
        ids = self._controls.get(token)
        return np.array([self.token_id(token)], np.int32) if ids is None else ids

    def decode(self, ids: Sequence[int] | np.ndarray, skip_special: bool = False) -> str:
        """Return the text of ids. Control tokens are written by their names, or omitted with skip_special.

        If omitted, the text is that without them, as in transformers: "a" and " b" around one keep the space.
        """
        if skip_special:
            return self.backend.decode([index for index in map(int, ids) if index not in self._names])
        parts, run = [], []
        for index in map(int, ids):
            if index not in self._names:
                run.append(index)
                continue
            parts += [self.backend.decode(run), self._names[index]]
            run = []
        return "".join([*parts, self.backend.decode(run)])

    def token_id(self, token: str) -> int:
        """Return the id of a control token. Raise TokenizerError if there is none of that name."""
        if token in self._matched:
            return self._matched[token]
        if token not in self._special:
            known = ", ".join(self.added_tokens) or "none"
            raise TokenizerError(
                f"{self.source_files[0]}: no special token '{token}' (added: {known}); name it as an extra token"
            )
        return self._special[token]

    def has(self, token: str) -> bool:
        """Return whether token_id knows a token."""
        return token in self._special or token in self._matched

    def is_special(self, token: str) -> bool:
        """Return whether text cannot spell a token."""
        return token in self._special

    def id_to_token(self, index: int) -> str:
        """Return the name of a control token, else the piece of the vocabulary. Raise TokenizerError outside the vocabulary."""
        if index in self._names:
            return self._names[index]
        if not 0 <= index <= self.backend.highest:
            raise TokenizerError(
                f"{self.source_files[0]}: token id {index} is outside the vocabulary of {self.vocab_size}"
            )
        return self.backend.piece(index)

    @property
    def special_tokens(self) -> dict[str, int]:
        """Every token that text cannot spell, by name: the model's own controls and the added ones."""
        return dict(self._special)

    @property
    def fingerprint(self) -> str:
        """Equal for equal tokenizers wherever their files lie: a hash of the model and the added tokens' ids."""
        return tokenizer_files.fingerprint([self.backend.fingerprint, sorted(self.added_tokens.items())])

    def info(self) -> dict[str, Any]:
        """Return what a manifest or a checkpoint keeps of the tokenizer; see manifest.check_tokenizer."""
        return {
            "kind": self.kind,
            "fingerprint": self.fingerprint,
            "model_fingerprint": self.backend.fingerprint,
            "vocab_size": self.vocab_size,
            "base_vocab_size": self.base_vocab_size,
            "added_tokens": self.added_tokens,
        }


def extra_tokens(tokenizer_type: str | None, names: str | Sequence[str] | None, new_tokens: bool = True) -> list[str]:
    """Return the extra tokens that Megatron-LLM's flags define, in the order of their ids, without empty names and duplicates.

    tokenizer_type: for SentencePieceTokenizer, MEGATRON_TOKENS come first unless new_tokens is False. None: only names. names:
    --vocab_extra_ids_list, a list or one string with commas; quotes inside it are allowed, as on the model cards. Raise TokenizerError for
    a type that is not in TOKENIZER_TYPES.
    """
    if tokenizer_type is not None and tokenizer_type not in TOKENIZER_TYPES:
        raise TokenizerError(
            f"unknown tokenizer_type {tokenizer_type}: choose one of "
            f"{', '.join(TOKENIZER_TYPES)}{alternatives(tokenizer_type, TOKENIZER_TYPES)}"
        )
    listed = names.strip("\"'").split(",") if isinstance(names, str) else names or []
    first = MEGATRON_TOKENS if tokenizer_type == "SentencePieceTokenizer" and new_tokens else ()
    return list(dict.fromkeys([*first, *(name.strip() for name in listed if name.strip())]))


def load_tokenizer(path: str | Path, extra_tokens: Sequence[str] = (), recorded: str | None = None) -> Tokenizer:
    """Read a tokenizer: a SentencePiece model, a tokenizer.json, or a folder with one of them.

    Where a folder has both and they agree on every piece and on spaces, the SentencePiece model does the work (it is
    faster). Added tokens named in the folder's files are known. extra_tokens that are not there yet get the next free
    ids, in their order. recorded: the fingerprint that a checkpoint or shards recorded; if it is that of an earlier
    release's way to read the same files, they are read in that way.
    Raise TokenizerError: no such file, neither format, or an extra token that ordinary text can spell.
    """
    found = tokenizer_files.find(Path(path))
    tokenizer = _with_tokens(found, found.backend(), extra_tokens)
    if recorded is not None and tokenizer.fingerprint != recorded:
        earlier = _with_tokens(found, found.earlier_backend(), extra_tokens)
        tokenizer = earlier if earlier.fingerprint == recorded else tokenizer
    return tokenizer


def _with_tokens(found: tokenizer_files.TokenizerFiles, backend: Backend, extra_tokens: Sequence[str]) -> Tokenizer:
    known = found.added_tokens()
    added = {name: index for name, index in known.items() if backend.controls.get(name) != index}
    following = max([backend.highest, *added.values()]) + 1
    for token in dict.fromkeys(extra_tokens):
        if token in added or token in backend.controls:
            continue
        inside = backend.find(token)
        added[token] = following if inside is None else inside
        following += inside is None
    bos, eos = found.ends()
    return Tokenizer(backend, dict(sorted(added.items(), key=lambda item: item[1])), bos, eos, found.files)
