"""Compares existing shards with what this run would write, so that a requeued task that has finished does nothing.

They are the same only with the same settings and version, input files with the same names and content, and undamaged files of the
earlier run. The manifest records most of this; the settings are in a file beside it.
"""

import dataclasses
import json
from pathlib import Path
from typing import Any

from megatron_ft import __version__, files
from megatron_ft.data.chat_format import describe
from megatron_ft.data.manifest import Manifest, manifest_path, read_manifest
from megatron_ft.data.shards import ENDINGS, open_shards
from megatron_ft.data.tokenizer import Tokenizer
from megatron_ft.data.verify import verify_shards
from megatron_ft.errors import DataError, UserError
from tools.pretokenizer.prompts import ENDING as PROMPTS
from tools.pretokenizer.sampling import SPLITS
from tools.pretokenizer.settings import Settings
from tools.pretokenizer.sources import Source

ENDING = "_settings.json"
FORMAT_VERSION = 1
_WITHOUT_EFFECT = {"output_dir", "output_dir_suffix", "filename_prefix", "workers"}
"""Settings that do not change the written files."""


def settings_file(prefix: Path) -> Path:
    """Return the path of a run's settings. prefix: without the name of the split; a training split always exists."""
    return Path(f"{prefix}-train{ENDING}")


def record(settings: Settings, text: str | None, splits: list[str]) -> None:
    """Write the run's settings, before the manifest of the training split marks it as finished. splits: those written."""
    content = {"format_version": FORMAT_VERSION, **_as_json(settings, text), "files": _names(settings, text, splits)}
    files.write_json(settings_file(settings.prefix), content)


def difference(
    settings: Settings, text: str | None, tokenizer: Tokenizer, chat_format: Any, sources: list[Source]
) -> str | None:
    """Return how the finished shards of this name differ from this run's, in a few words; None if they are the same. The input and the
    shards are read only if the cheaper comparisons find no difference."""
    try:
        earlier = files.read_json(settings_file(settings.prefix))
        manifest = read_manifest(f"{settings.prefix}-train")
        return (
            _other_settings(earlier, _as_json(settings, text))
            or _other_tokenizer(manifest, settings, tokenizer, chat_format)
            or _missing_file(settings.prefix.parent, earlier["files"])
            or _other_input(manifest, sources)
            or _damaged(settings, earlier["files"])
        )
    except (UserError, OSError, KeyError, TypeError, AttributeError):
        return "their settings are not known"


def _as_json(settings: Settings, text: str | None) -> dict[str, Any]:
    """Return the settings as plain JSON. text: ending of the file with the chats' text."""
    chosen = {name: value for name, value in dataclasses.asdict(settings).items() if name not in _WITHOUT_EFFECT}
    return json.loads(json.dumps({"megatron_ft": __version__, "text": text, "settings": chosen}, default=str))


def _names(settings: Settings, text: str | None, splits: list[str]) -> list[str]:
    """Return the name of every file of a finished run."""
    endings = ("-manifest.json", *ENDINGS, "_stats.json", "_stats.txt", "_stats.html", *([text] if text else []))
    prompts = [f"{settings.prefix.name}-val{PROMPTS}"] if settings.write_prompts and "val" in splits else []
    return [
        "special_tokens.json",
        *prompts,
        *(f"{settings.prefix.name}-{split}{ending}" for split in splits for ending in endings),
    ]


def _other_settings(earlier: dict[str, Any], current: dict[str, Any]) -> str | None:
    if earlier["format_version"] != FORMAT_VERSION or earlier["megatron_ft"] != current["megatron_ft"]:
        return f"made by megatron_ft {earlier['megatron_ft']}, this is {current['megatron_ft']}"
    before, now = ({"write_json": content["text"], **content["settings"]} for content in (earlier, current))
    other = sorted(name for name in before.keys() | now.keys() if before.get(name) != now.get(name))
    return f"made with other settings: {', '.join(other)}" if other else None


def _other_tokenizer(manifest: Manifest, settings: Settings, tokenizer: Tokenizer, chat_format: Any) -> str | None:
    if manifest.tokenizer != {**tokenizer.info(), "file": str(settings.vocab_file)}:
        return "made with another tokenizer"
    return None if manifest.chat_format == describe(chat_format) else "made with another chat format"


def _missing_file(folder: Path, names: list[str]) -> str | None:
    gone = next((name for name in names if not (folder / name).is_file()), None)
    return f"{gone} no longer exists" if gone else None


def _other_input(manifest: Manifest, sources: list[Source]) -> str | None:
    before = [(source["name"], source["file"], source["digest"]) for source in manifest.sources]
    if [entry[:2] for entry in before] != [(source.label, str(source.path)) for source in sources]:
        return "made from other files"
    changed = next((s for s, entry in zip(sources, before, strict=True) if s.digest() != entry[2]), None)
    return f"{changed.path} has changed since" if changed else None


def _damaged(settings: Settings, names: list[str]) -> str | None:
    prefixes = [Path(f"{settings.prefix}-{split}") for split in SPLITS]
    try:
        verify_shards([open_shards(one) for one in prefixes if manifest_path(one).name in names], "--overwrite")
    except DataError as error:
        return f"damaged: {error}"
    return None
