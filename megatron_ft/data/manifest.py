"""PREFIX-manifest.json: how shards were made, so that training can refuse what does not fit instead of learning
nonsense.

It carries a hash of itself: a changed digit in it is found too. Knows neither the shards' bytes nor a tokenizer.
"""

import dataclasses
import json
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from megatron_ft.data.fingerprint import fingerprint
from megatron_ft.data.roles import ROLE_NAMES
from megatron_ft.errors import DataError
from megatron_ft.files import write_json

FORMAT_VERSION = 2  # 1, without marks and weights, is still written where there are none, and read
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


def manifest_path(prefix: str | Path) -> Path:
    return Path(f"{prefix}-manifest.json")


def write_manifest(manifest: Manifest, path: Path) -> None:
    content = dataclasses.asdict(manifest)
    if content["format_version"] == 1:
        del content["weights"]
    write_json(path, {"format_version": content.pop("format_version"), **content, "digest": fingerprint(content)})


def read_manifest(prefix: str | Path) -> Manifest:
    """The manifest of shards. Raises DataError: missing, damaged, or of another version."""
    path = manifest_path(prefix)
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
        version, digest = content.pop("format_version"), content.pop("digest")
    except FileNotFoundError as error:
        raise DataError(
            f"{path}: no such file; give the prefix of finished shards (PREFIX-SPLIT), or {AGAIN}"
        ) from error
    except (OSError, ValueError, KeyError, AttributeError) as error:
        raise DataError(f"{path}: not a readable manifest ({error}); {AGAIN}") from error
    if version not in range(1, FORMAT_VERSION + 1):
        raise DataError(f"{path}: format version {version}, this megatron_ft reads 1 to {FORMAT_VERSION}; {AGAIN}")
    expected = (
        {f.name for f in dataclasses.fields(Manifest)} - {"format_version"} - ({"weights"} if version == 1 else set())
    )
    if digest != fingerprint(content) or set(content) != expected:
        raise DataError(f"{path}: has been changed since it was written; {AGAIN}")
    return Manifest(**content, format_version=version)


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
            f"convert the model with the same extra tokens, or {REMEDY}"
        )
    if "fingerprint" not in ours or not tokenizer_info or ours["fingerprint"] == tokenizer_info["fingerprint"]:
        return
    if ours["model_fingerprint"] != tokenizer_info.get("model_fingerprint"):
        raise DataError(
            f"{where}: made with another tokenizer ({_describe(ours)}) than the model's ({_describe(tokenizer_info)}); "
            f"{REMEDY}"
        )
    _compare_added(ours["added_tokens"], tokenizer_info["added_tokens"], where)


def _compare_added(ours: dict[str, int], theirs: dict[str, int], where: str | Path) -> None:
    names = {index: name for name, index in theirs.items()}
    for name, index in ours.items():
        if theirs.get(name, index) != index:
            raise DataError(f"{where}: '{name}' has id {index} there and {theirs[name]} in the model; {REMEDY}")
        if names.get(index, name) != name:
            raise DataError(f"{where}: id {index} is '{name}' there and '{names[index]}' in the model; {REMEDY}")


def _describe(info: dict[str, Any]) -> str:
    return f"{info['kind']}, {info['vocab_size']} tokens, {info['fingerprint'][:13]}"
