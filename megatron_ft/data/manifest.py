"""PREFIX-manifest.json: how shards were made, so that training can refuse shards that do not fit.

It contains a hash of itself, which also detects a changed digit. It does not read the shards' files or a tokenizer.
"""

import dataclasses
import json
import os
import re
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from megatron_ft.data.fingerprint import fingerprint
from megatron_ft.data.roles import ALL_NAMES, MOST_WEIGHTS, ROLE_NAMES
from megatron_ft.errors import DataError
from megatron_ft.files import write_json

# 1 holds bare roles of speakers, 2 marks and weights too, 3 also parts of what an assistant says. The lowest that does is written.
FORMAT_VERSION = 3
MOST_BYTES = 64 << 20  # of a manifest; one of a hundred thousand sources has a third of that
AGAIN = "run pretokenize again"
REMEDY = "pretokenize again with the model's tokenizer"


@dataclass
class Manifest:
    """tokenizer: see Tokenizer.info. chat_format: {name, stop_token}, {} for plain text.

    sources: [{name, file, digest, documents: [first, end]}], in the order of the samples. counts: {samples, tokens,
    tokens_by_role}, and marked_tokens where there are such.
    weights: the messages' own weights that role bytes refer to, see roles.py.
    files: ending after PREFIX, for instance "-text.bin" -> {bytes, digest}.
    """

    tokenizer: dict[str, Any] = field(default_factory=dict)
    chat_format: dict[str, Any] = field(default_factory=dict)
    sources: list[dict[str, Any]] = field(default_factory=list)
    counts: dict[str, Any] = field(default_factory=dict)
    files: dict[str, dict[str, Any]] = field(default_factory=dict)
    roles: list[str] = field(default_factory=lambda: list(ROLE_NAMES))
    weights: list[float] = field(default_factory=lambda: [1.0])
    format_version: int = 1


def manifest_path(prefix: str | os.PathLike) -> Path:
    return Path(f"{prefix}-manifest.json")


def write_manifest(manifest: Manifest, path: Path) -> None:
    content = dataclasses.asdict(manifest)
    if content["format_version"] == 1:
        del content["weights"]
    write_json(path, {"format_version": content.pop("format_version"), **content, "digest": fingerprint(content)})


def read_manifest(prefix: str | Path) -> Manifest:
    """Return the manifest of shards. Raise DataError if it is missing, damaged, or of another version."""
    path = manifest_path(prefix)
    try:
        with path.open("rb") as file:
            data = file.read(MOST_BYTES + 1)
    except FileNotFoundError as error:
        raise DataError(f"{path}: no such file; {_instead_of(Path(prefix))}") from error
    except OSError as error:
        raise DataError(f"{path}: not a readable manifest ({error.strerror or error}); {AGAIN}") from error
    if len(data) > MOST_BYTES:
        raise DataError(f"{path}: larger than {MOST_BYTES >> 20} MiB, this is no manifest; {AGAIN}")
    return parse_manifest(data, path)


def _instead_of(prefix: Path) -> str:
    """Return the advice for a name that has no shards."""
    if prefix.is_file():
        return f"{prefix} is a file of its own: if it holds chats, make shards of it with megatron-ft pretokenize --input {prefix}"
    splits = sorted(
        str(found).removesuffix("-manifest.json") for found in prefix.parent.glob(f"{prefix.name}-*-manifest.json")
    )
    if splits:
        return f"did you mean {' or '.join(splits)}?"
    if re.fullmatch(r"\d*\.?\d+", str(prefix)):
        return "a number among the prefixes? weights have a flag of their own, --data_weights"
    return f"give the prefix of finished shards (PREFIX-SPLIT), or {AGAIN}"


def parse_manifest(data: bytes, path: Path) -> Manifest:
    """Return the manifest in the content of a file, as read_manifest."""
    try:
        content = json.loads(data)
        version, digest = content.pop("format_version"), content.pop("digest")
    except (ValueError, KeyError, AttributeError, TypeError, RecursionError) as error:
        raise DataError(f"{path}: not a readable manifest ({error}); {AGAIN}") from error
    if isinstance(version, bool) or version not in range(1, FORMAT_VERSION + 1):
        raise DataError(f"{path}: format version {version}, this megatron_ft reads 1 to {FORMAT_VERSION}; {AGAIN}")
    expected = (
        {f.name for f in dataclasses.fields(Manifest)} - {"format_version"} - ({"weights"} if version == 1 else set())
    )
    if digest != fingerprint(content) or set(content) != expected:
        raise DataError(f"{path}: has been changed since it was written; {AGAIN}")
    if (wrong := _wrong_kind(content, version)) is not None:
        raise DataError(f"{path}: its entry {wrong} is not what a manifest holds; {AGAIN}")
    return Manifest(**content, format_version=version)


def _wrong_kind(content: dict[str, Any], version: int) -> str | None:
    """Return the first entry of another type than write_manifest writes."""
    tokenizer, counts, files, roles = (content[key] for key in ("tokenizer", "counts", "files", "roles"))
    text = ("kind", "fingerprint", "model_fingerprint", "file")
    sound = {
        "tokenizer": _is_table(tokenizer) and _is_count(tokenizer.get("vocab_size"))
        and all(isinstance(tokenizer.get(key, ""), str) for key in text)
        and _is_table(tokenizer.get("added_tokens", {}), _is_count)
        and len({"fingerprint", "model_fingerprint", "added_tokens", "kind"} & set(tokenizer)) in (0, 4),
        "chat_format": _is_table(content["chat_format"], lambda value: isinstance(value, str)),
        "sources": isinstance(content["sources"], list) and all(map(_is_source, content["sources"])),
        "counts": _is_table(counts) and _is_table(counts.get("tokens_by_role"), _is_count)
        and all(_is_count(counts.get(key)) for key in ("samples", "tokens"))
        and _is_count(counts.get("marked_tokens", 0)),
        "files": _is_table(files, lambda entry: _is_table(entry) and _is_count(entry.get("bytes"))
                           and isinstance(entry.get("digest"), str))
        and {"-text.bin", "-text.idx", "-role.bin", "-role.idx"} <= set(files),
        "roles": roles == list(ALL_NAMES if version > 2 else ROLE_NAMES),
        "weights": _are_weights(content.get("weights", [1.0])),
    }  # fmt: skip
    return next((key for key, good in sound.items() if not good), None)


def _is_count(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and 0 <= value < 1 << 62


def _is_table(value: Any, entry: Callable[[Any], bool] = lambda value: True) -> bool:
    return isinstance(value, dict) and all(map(entry, value.values()))


def _is_source(value: Any) -> bool:
    documents = value.get("documents") if isinstance(value, dict) else None
    return (
        isinstance(documents, list) and len(documents) == 2 and all(map(_is_count, documents))
        and documents[0] <= documents[1] and all(isinstance(value.get(key), str) for key in ("name", "file", "digest"))
    )  # fmt: skip


def _are_weights(value: Any) -> bool:
    return (
        isinstance(value, list) and 1 <= len(value) <= MOST_WEIGHTS
        and all(isinstance(one, int | float) and 0 <= one < float("inf") for one in value)
    )  # fmt: skip


def check_tokenizer(
    manifest: Manifest, tokenizer_info: dict[str, Any], vocab_size: int, where: str | Path = "the shards"
) -> None:
    """Raise DataError unless shards made with the manifest's tokenizer mean the same to a model.

    tokenizer_info: Tokenizer.info() of the model's tokenizer, {} where it is unknown. It may have fewer or more added
    tokens than the shards', as long as no token has two ids and no id two tokens.
    vocab_size: rows of the model's embedding that stand for tokens.
    where: the shards, for the message.
    """
    ours = manifest.tokenizer
    if ours["vocab_size"] > vocab_size:
        raise DataError(
            f"{where}: tokenized for a vocabulary of {ours['vocab_size']}, the model's has {vocab_size}; "
            f"convert the model with the same extra tokens, or {REMEDY}{_both(ours, tokenizer_info)}"
        )
    if "fingerprint" not in ours or not tokenizer_info or ours["fingerprint"] == tokenizer_info["fingerprint"]:
        return
    if ours["model_fingerprint"] != tokenizer_info.get("model_fingerprint"):
        raise DataError(
            f"{where}: made with another tokenizer ({_describe(ours)}) than the model's ({_describe(tokenizer_info)}); "
            f"{REMEDY}"
        )
    compare_added(ours["added_tokens"], tokenizer_info["added_tokens"], where)


def compare_added(ours: dict[str, int], theirs: dict[str, int], where: str | Path) -> None:
    """Raise DataError where a token has two ids, or an id two tokens."""
    names = {index: name for name, index in theirs.items()}
    for name, index in ours.items():
        if theirs.get(name, index) != index:
            raise DataError(f"{where}: '{name}' has id {index} there and {theirs[name]} in the model; {REMEDY}")
        if names.get(index, name) != name:
            raise DataError(f"{where}: id {index} is '{name}' there and '{names[index]}' in the model; {REMEDY}")


def _both(ours: dict[str, Any], theirs: dict[str, Any]) -> str:
    """Name both tokenizers, where they are known and differ."""
    known = "kind" in ours and "kind" in theirs and ours["fingerprint"] != theirs["fingerprint"]
    return f" (the shards' tokenizer: {_describe(ours)}; the model's: {_describe(theirs)})" if known else ""


def _describe(info: dict[str, Any]) -> str:
    return f"{info['kind']}, {info['vocab_size']} tokens, {info['fingerprint'][:13]}"
