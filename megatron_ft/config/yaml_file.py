"""Reads a YAML configuration with the line of every key, and writes one. A key twice, or that nobody knows, is refused.

Keys are field names, at the top or nested under their section's name; hyphens count as underscores.
"""

import re
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import yaml

from megatron_ft.config.fields import Option, section_name
from megatron_ft.config.hints import suggestion
from megatron_ft.errors import ConfigError
from megatron_ft.files import read_text


@dataclass(frozen=True)
class Entry:
    """A value and where it was written ("run.yaml, line 3")."""

    value: Any
    where: str


class _Loader(yaml.SafeLoader):
    """As PyYAML reads, but 1e-5 is a number (PyYAML asks for 1.0e-5) and a key twice in one mapping is an error."""

    where: Callable[[yaml.Node], str]

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict:
        self.refuse_duplicates(node)
        return super().construct_mapping(node, deep=deep)

    def refuse_duplicates(self, node: yaml.MappingNode) -> None:
        seen: dict[str, yaml.Node] = {}
        for key, _ in node.value:
            if key.tag != "tag:yaml.org,2002:merge" and key.value in seen and isinstance(key, yaml.ScalarNode):
                first = seen[key.value].start_mark.line + 1
                raise ConfigError(f"{self.where(key)}: {key.value} is given twice, first in line {first}; keep one")
            if isinstance(key, yaml.ScalarNode):
                seen[key.value] = key


_Loader.add_implicit_resolver(
    "tag:yaml.org,2002:float", re.compile(r"^[-+]?[0-9][0-9_]*(\.[0-9_]*)?[eE][-+]?[0-9]+$"), list("-+0123456789")
)


def yaml_value(text: str) -> Any:
    """The value YAML reads in this text: 3, 1e-5, true, [a, b], or the text itself where it is no YAML."""
    try:
        return _load(text, "value")[1]
    except ConfigError:
        return text


def read_settings(path: str, options: dict[str, Option], open_keys: bool) -> tuple[dict[str, Entry], dict[str, Any]]:
    """Settings of a file by name, and (with open_keys) the keys no section knows as plain values.

    Raises ConfigError with file and line for what is no YAML, no mapping, an unknown key, a setting given twice.
    """
    loader, node = _compose(read_text(path), path)
    sections = {section_name(option.section): option.section for option in options.values()}
    found: dict[str, Entry] = {}
    others: dict[str, Any] = {}
    for key, value_node, where in _pairs(loader, node):
        if key in sections and isinstance(value_node, yaml.MappingNode):
            inside = {name: option for name, option in options.items() if option.section is sections[key]}
            for name, inner_node, inner_where in _pairs(loader, value_node):
                if name not in inside:
                    raise _unknown(name, inner_where, options, f" in {key}")
                _put(found, name, Entry(loader.construct_object(inner_node, deep=True), inner_where))
        elif key in sections and key not in options:
            if value_node.tag != "tag:yaml.org,2002:null":  # a section with nothing in it is fine
                raise ConfigError(f"{where}: {key} is a section; write its settings below it, indented")
        elif key in options:
            _put(found, key, Entry(loader.construct_object(value_node, deep=True), where))
        elif open_keys:
            others[key] = loader.construct_object(value_node, deep=True)
        else:
            raise _unknown(key, where, [*options, *sections], "")
    return found, others


def write_settings(
    sections: tuple[type, ...], values: dict[str, Any], options: dict[str, Option], others: dict[str, Any]
) -> str:
    """YAML text by section that read_settings reads back to the same; a required setting without value is a comment."""
    parts = [_dump(others)] if others else []
    for section in sections:
        lines = []
        for name, option in options.items():
            if option.section is section:
                given = name in values
                lines.append(_dump({name: _plain(values[name])}) if given else f"# {name}:  (required)\n")
        body = "".join("  " + line + "\n" for text in lines for line in text.splitlines())
        parts.append(f"{section_name(section)}:\n{body}" if lines else "")
    return "".join(parts)


def _pairs(loader: _Loader, node: yaml.MappingNode) -> list[tuple[str, yaml.Node, str]]:
    loader.refuse_duplicates(node)
    loader.flatten_mapping(node)
    pairs = {}
    for key, value in node.value:
        name = key.value.replace("-", "_") if isinstance(key, yaml.ScalarNode) else str(key.value)
        pairs[name] = (name, value, loader.where(key))
    return list(pairs.values())


def _put(found: dict[str, Entry], name: str, entry: Entry) -> None:
    if name in found:
        raise ConfigError(f"{entry.where}: {name} is given twice, first in {found[name].where}; keep one")
    found[name] = entry


def _unknown(name: str, where: str, known: Any, place: str) -> ConfigError:
    return ConfigError(f"{where}: unknown key {name}{place}{suggestion(name, known)}")


def _compose(text: str, path: str) -> tuple[_Loader, yaml.MappingNode]:
    loader, node = _open(text, path)
    if node is None:
        node = yaml.MappingNode("tag:yaml.org,2002:map", [])  # an empty file
    if not isinstance(node, yaml.MappingNode):
        raise ConfigError(f"{path}: holds no settings; write lines such as `name: value`")
    return loader, node


def _open(text: str, path: str) -> tuple[_Loader, yaml.Node | None]:
    try:
        loader = _Loader(text)
        loader.where = lambda node: f"{path}, line {node.start_mark.line + 1}"
        return loader, loader.get_single_node()
    except yaml.MarkedYAMLError as error:
        line = error.problem_mark.line + 1 if error.problem_mark else "?"
        remedy = "check indentation, colons and quotes"
        raise ConfigError(f"{path}, line {line}: not valid YAML ({error.problem}); {remedy}") from None
    except yaml.YAMLError as error:
        raise ConfigError(f"{path}: not valid YAML ({' '.join(str(error).split())})") from None


def _load(text: str, path: str) -> tuple[_Loader, Any]:
    loader, node = _open(text, path)
    return loader, None if node is None else loader.construct_document(node)


def _dump(value: Any) -> str:
    return yaml.safe_dump(value, sort_keys=False, allow_unicode=True, width=1 << 20)


def _plain(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _plain(inner) for key, inner in value.items()}
    if isinstance(value, list | tuple | set | frozenset):
        return [_plain(inner) for inner in value]
    return value if isinstance(value, str | int | float | bool | None) else str(value)
