"""The settings of a run: flags and YAML sections combined into one Settings object.

All YAML files of the configs folder are read as one. A run starts with the section `defaults`; each named section overrides earlier
ones, and flags override all. --input needs no YAML: it stands for a configuration with one dataset per file.
"""

import dataclasses
import typing
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

from megatron_ft.config.hints import alternatives, meant, suggestion
from megatron_ft.config.values import UNKNOWN, plain
from megatron_ft.config.yaml_file import read_settings
from megatron_ft.data.template_options import TemplateOptions, parse_arguments
from megatron_ft.errors import ConfigError
from tools.pretokenizer import mixing
from tools.pretokenizer.duplicates import minhash_library
from tools.pretokenizer.flags import Pretokenize
from tools.pretokenizer.published import UNPUBLISHED

PACKAGED_CONFIGS = Path(__file__).parent / "configs"


@dataclass
class Settings:
    """The keys of a configuration. datasets: [(name, keys of the dataset)]."""

    datasets: list[Any] = field(default_factory=list)
    datasets_extra: list[Any] = field(default_factory=list)
    output_dir: str | None = None
    output_dir_suffix: str | None = ""
    filename_prefix: str | None = None
    tokenizer_type: str | None = None
    vocab_file: str | None = None
    vocab_extra_ids_list: str | list[str] | None = None
    new_tokens: bool = True
    chat_format: str = "chatml"
    template_date: str | None = None
    template_arguments: list[str] = field(default_factory=list)
    rewritten_turns: Literal["samples", "one"] = "samples"
    min_assistant_tokens: int | None = None
    max_count: int | None = None
    eval_size: int | None = None
    rng_seed: int = 42
    cache_dir: str | None = ".cache"
    dataset_impl: str = "mmap"
    use_system_prefix: bool = False
    min_tokens: int | None = None
    max_tokens: int | None = None
    role_order: str | None = None
    refusal_phrases: bool | list[str] | str | None = None
    duplicates: Literal["keep", "exact", "near"] = "keep"
    near_threshold: float = 0.8
    mix_by: str | None = None
    mix_total: int | None = None
    mix_max_epochs: float = 1.0
    on_bad_record: Literal["fail", "skip"] = "fail"
    workers: int | None = None
    write_prompts: int | None = None

    @property
    def template_options(self) -> TemplateOptions:
        """Return what the tokenizer's own chat template is given."""
        return TemplateOptions(self.template_date, parse_arguments(self.template_arguments), self.rewritten_turns)

    @property
    def prefix(self) -> Path:
        """Return the prefix of the shards, without the name of the split."""
        return Path(f"{self.output_dir}{self.output_dir_suffix or ''}") / str(self.filename_prefix)


def resolve(flags: Pretokenize, others: dict[str, Any]) -> Settings:
    """Return the settings of a run. others: flags that are configuration keys (None unsets one).

    Raise ConfigError for an unknown section or key, a value of the wrong type, a required key that is missing.
    """
    keys = {**_from_sections(flags), **(_from_input(flags, others) if flags.input else {})}
    given = {"vocab_file": flags.tokenizer} | {name: getattr(flags, name) for name in _ALSO_KEYS}
    given |= {"template_arguments": flags.template_arguments or None}
    keys |= {name: value for name, value in given.items() if value is not None} | others
    defaults = {name: value for name, value in keys.items() if value is not None or name in _OPTIONAL}
    settings = build(Settings, defaults, "the configuration")
    settings.datasets = [_dataset(entry, flags.val_split) for entry in settings.datasets + settings.datasets_extra]
    _check(settings)
    return settings


def build(kind: type, values: dict[str, Any], where: str) -> Any:
    """Return a dataclass from plain values with checked types. Raise ConfigError with the key."""
    fields = {f.name: f.type for f in dataclasses.fields(kind)}
    for key in values:
        if key not in fields:
            raise ConfigError(f"{where}: unknown key {key}{suggestion(key, fields)}")
    found = {key: plain(fields[key], value) for key, value in values.items()}
    if UNKNOWN not in found.values():
        return kind(**found)
    from pydantic import TypeAdapter, ValidationError

    try:
        return TypeAdapter(kind).validate_python(values)
    except ValidationError as error:
        first = error.errors(include_url=False)[0]
        raise ConfigError(f"{where}: {first['loc'][0]} is {first['input']!r}: {first['msg'].lower()}") from None


_ALSO_KEYS = (
    *("chat_format", "output_dir", "min_assistant_tokens", "min_tokens", "max_tokens", "max_count", "role_order"),
    *("duplicates", "on_bad_record", "workers", "template_date", "rewritten_turns", "write_prompts"),
)
_OF_DATASETS = {"lang", "split", "fraction", "size", "max_val_set", "marked_prompts", "val_rounding", "manual_seed"}
_OPTIONAL = {f.name for f in dataclasses.fields(Settings) if type(None) in typing.get_args(f.type)}


def _from_sections(flags: Pretokenize) -> dict[str, Any]:
    if flags.input:
        return {}
    if flags.keys:
        raise ConfigError("--keys needs --input; in YAML write `- custom: {keys: {question: KEY, answer: KEY}}`")
    if not flags.configs:
        raise ConfigError(
            "nothing to do: give --input FILE --tokenizer PATH --output_prefix DIR/NAME, or --configs SECTION ..."
        )
    folder = flags.config_dir or PACKAGED_CONFIGS
    sections = read_sections(folder)
    keys = dict(sections.get("defaults", {}))
    for name in (part.strip() for names in flags.configs for part in names.split(",") if part.strip()):
        if (known := meant(name, sections, beginnings=False)) is None:
            raise ConfigError(f"{folder}: no section {name}{alternatives(name, sections)}")
        keys |= sections[known]
    return keys


def read_sections(folder: Path) -> dict[str, dict[str, Any]]:
    """Return all sections of a folder's YAML files. Raise ConfigError if there are no files, for a section in two files, and for one
    that is not a mapping."""
    sections: dict[str, dict[str, Any]] = {}
    origin: dict[str, Path] = {}
    paths = sorted(path for path in folder.glob("*") if path.suffix in (".yaml", ".yml"))
    if not paths:
        raise ConfigError(f"{folder}: no YAML files in this folder; choose another one with --config_dir")
    for path in paths:
        for name, keys in read_settings(str(path), {}, open_keys=True)[1].items():
            if name in sections:
                raise ConfigError(f"{path}: section {name} is also in {origin[name]}; rename one of them")
            if not isinstance(keys, dict):
                raise ConfigError(f"{path}: section {name} has no keys; indent its settings below it")
            sections[name], origin[name] = {key.replace("-", "_"): value for key, value in keys.items()}, path
    return sections


def _from_input(flags: Pretokenize, others: dict[str, Any]) -> dict[str, Any]:
    """Return the configuration for --input. Flags that are keys of the file's reader are removed from others."""
    from tools.pretokenizer.readers import get_reader, recognise

    if flags.configs:
        raise ConfigError(
            "--input and --configs: give only one of them; in YAML a dataset's file is its input_file_path"
        )
    for name in ("tokenizer", "output_prefix"):
        if getattr(flags, name) is None:
            raise ConfigError(f"--input needs --{name}; see --help")
    datasets, meanings = [], {"keys": flags.keys} if flags.keys else {}
    for path in flags.input:
        reader = get_reader("custom") if flags.keys else recognise(Path(path), flags.on_bad_record == "skip")
        known = {f.name for f in dataclasses.fields(reader.options)} | _OF_DATASETS
        own = {key: value for key, value in others.items() if key in known}
        own = {key: value for key, value in UNPUBLISHED.items() if key in known} | own
        datasets.append({reader.name: {"input_file_path": path, "val_split": 0.1, **own, **meanings}})
    for key in {key for entry in datasets for keys in entry.values() for key in keys}:
        others.pop(key, None)
    prefix = Path(str(flags.output_prefix))
    return {"datasets": datasets, "output_dir": str(prefix.parent), "filename_prefix": prefix.name}


def _dataset(entry: Any, val_split: float | None) -> tuple[str, dict[str, Any]]:
    """Return a dataset's name and keys from `- name` or `- name: {key: value}`."""
    if isinstance(entry, str):
        entry = {entry: {}}
    if not isinstance(entry, dict) or len(entry) != 1:
        raise ConfigError(f"datasets: {entry!r} is not a dataset; write `- name: {{key: value}}`")
    (name, keys), *_ = entry.items()
    keys = {} if keys is None else keys
    if not isinstance(keys, dict):
        raise ConfigError(f"datasets: the keys of {name} are {keys!r}; write `- {name}: {{key: value}}`")
    return name, keys if val_split is None else {**keys, "val_split": val_split}


def _check(settings: Settings) -> None:
    for name in ("datasets", "output_dir", "filename_prefix", "vocab_file"):
        if not getattr(settings, name):
            raise ConfigError(f"{name} is not set; add a section with {name}, or --{name}")
    if settings.dataset_impl != "mmap":
        raise ConfigError(f"dataset_impl {settings.dataset_impl}: only mmap is supported; remove the key")
    if settings.use_system_prefix:
        raise ConfigError("use_system_prefix: not supported; put the system message into the chats")
    mixing.check(settings.mix_by, settings.mix_total, settings.mix_max_epochs)
    if not 0 < settings.near_threshold <= 1:
        raise ConfigError(f"near_threshold is {settings.near_threshold}; give a share above 0 and up to 1")
    if settings.duplicates == "near":
        minhash_library()
    for name in ("max_count", "eval_size", "min_assistant_tokens", "workers", "write_prompts"):
        if (value := getattr(settings, name)) is not None and value < 0:
            raise ConfigError(f"{name} is {value}; give a number that is not negative")
