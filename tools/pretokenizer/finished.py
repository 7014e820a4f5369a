"""Whether shards that are there already are what this run would write: then a requeued task has nothing to do.

Strictly: the same settings and version, input with the same content under the same names, and every file of the earlier run whole.
What the manifest records is compared with; the settings, which it does not hold, lie beside it.
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
from tools.pretokenizer.sampling import SPLITS
from tools.pretokenizer.settings import Settings
from tools.pretokenizer.sources import Source

ENDING = "_settings.json"
FORMAT_VERSION = 1
_NO_MATTER = {"output_dir", "output_dir_suffix", "filename_prefix", "workers"}
"""Settings that the bytes do not depend on."""


def settings_file(prefix: Path) -> Path:
    """Where a run's settings lie. prefix: without the split's name; there is always a training split."""
    return Path(f"{prefix}-train{ENDING}")


def record(settings: Settings, text: str | None, splits: list[str]) -> None:
    """Write what the run was asked, before the training split's manifest makes it a finished one. splits: that were written."""
    content = {"format_version": FORMAT_VERSION, **_asked(settings, text), "files": _names(settings, text, splits)}
    files.write_json(settings_file(settings.prefix), content)


def difference(
    settings: Settings, text: str | None, tokenizer: Tokenizer, chat_format: Any, sources: list[Source]
) -> str | None:
    """Why the finished shards under this name are not this run's, in a few words; None where they are, whole. Reads the input and the
    shards, where nothing cheaper tells."""
    try:
        earlier = files.read_json(settings_file(settings.prefix))
        manifest = read_manifest(f"{settings.prefix}-train")
        return (
            _other_settings(earlier, _asked(settings, text))
            or _other_tokenizer(manifest, settings, tokenizer, chat_format)
            or _not_there(settings.prefix.parent, earlier["files"])
            or _other_input(manifest, sources)
            or _damaged(settings, earlier["files"])
        )
    except (UserError, OSError, KeyError, TypeError, AttributeError):
        return "with what settings is not known"


def _asked(settings: Settings, text: str | None) -> dict[str, Any]:
    """As plain JSON. text: ending of the file with the chats' text."""
    keys = {name: value for name, value in dataclasses.asdict(settings).items() if name not in _NO_MATTER}
    return json.loads(json.dumps({"megatron_ft": __version__, "text": text, "settings": keys}, default=str))


def _names(settings: Settings, text: str | None, splits: list[str]) -> list[str]:
    """Every file of a finished run."""
    endings = ("-manifest.json", *ENDINGS, "_stats.json", "_stats.txt", "_stats.html", *([text] if text else []))
    return [
        "special_tokens.json",
        *(f"{settings.prefix.name}-{split}{ending}" for split in splits for ending in endings),
    ]


def _other_settings(earlier: dict[str, Any], asked: dict[str, Any]) -> str | None:
    if earlier["format_version"] != FORMAT_VERSION or earlier["megatron_ft"] != asked["megatron_ft"]:
        return f"made by megatron_ft {earlier['megatron_ft']}, this is {asked['megatron_ft']}"
    before, now = ({"write_json": content["text"], **content["settings"]} for content in (earlier, asked))
    other = sorted(name for name in before.keys() | now.keys() if before.get(name) != now.get(name))
    return f"made with other settings: {', '.join(other)}" if other else None


def _other_tokenizer(manifest: Manifest, settings: Settings, tokenizer: Tokenizer, chat_format: Any) -> str | None:
    if manifest.tokenizer != {**tokenizer.info(), "file": str(settings.vocab_file)}:
        return "made with another tokenizer"
    return None if manifest.chat_format == describe(chat_format) else "made with another chat format"


def _not_there(folder: Path, names: list[str]) -> str | None:
    gone = next((name for name in names if not (folder / name).is_file()), None)
    return f"{gone} is not there any more" if gone else None


def _other_input(manifest: Manifest, sources: list[Source]) -> str | None:
    before = [(source["name"], source["file"], source["digest"]) for source in manifest.sources]
    if [entry[:2] for entry in before] != [(source.name, str(source.path)) for source in sources]:
        return "made of other files"
    changed = next((s for s, entry in zip(sources, before, strict=True) if s.digest() != entry[2]), None)
    return f"made before {changed.path} was changed" if changed else None


def _damaged(settings: Settings, names: list[str]) -> str | None:
    prefixes = [Path(f"{settings.prefix}-{split}") for split in SPLITS]
    try:
        verify_shards([open_shards(one) for one in prefixes if manifest_path(one).name in names], "--overwrite")
    except DataError as error:
        return f"damaged: {error}"
    return None
