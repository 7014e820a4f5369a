"""Reads a YAML configuration with the line of every key, and writes one. A duplicate or unknown key is an error.

Keys are field names, at the top or nested under their section's name; hyphens count as underscores.
"""

import contextlib
import itertools
import math
import re
import textwrap
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import yaml

from megatron_ft.config.fields import Option, section_name
from megatron_ft.config.hints import Wrong, refused_names, suggestion
from megatron_ft.config.megatron_flags import MEANS, SAME, Given, accepted, find, refusal
from megatron_ft.config.renamed import current
from megatron_ft.errors import ConfigError
from megatron_ft.files import read_text


@dataclass(frozen=True)
class Entry:
    """A value and where it was written ("run.yaml, line 3")."""

    value: Any
    where: str


def _setting_name(key: Any) -> str:
    return str(key).replace("-", "_")


class _Loader(yaml.SafeLoader):
    """As PyYAML reads, but 1e-5 is a number (PyYAML asks for 1.0e-5) and a key twice in one mapping is an error."""

    path = "value"

    def where(self, node: yaml.Node) -> str:
        return f"{self.path}, line {node.start_mark.line + 1}"

    def pairs(self, node: yaml.MappingNode) -> list[tuple[str, yaml.Node, str]]:
        """Yield name, value and place of each entry."""
        self._refuse_duplicates(node, _setting_name)
        self.flatten_mapping(node)  # inserts the content of `<<: *anchor` before the entries that override it
        entries = {_setting_name(key.value): (value, self.where(key)) for key, value in node.value}
        return [(name, value, where) for name, (value, where) in entries.items()]

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict:
        self._refuse_duplicates(node, str)
        return super().construct_mapping(node, deep=deep)

    def _refuse_duplicates(self, node: yaml.MappingNode, spelling: Callable[[Any], str]) -> None:
        seen: dict[str, yaml.Node] = {}
        for key, _ in node.value:
            if not isinstance(key, yaml.ScalarNode) or key.tag == "tag:yaml.org,2002:merge":
                continue
            if (first := seen.setdefault(spelling(key.value), key)) is not key:
                twice = f"{key.value} is given twice, first in line {first.start_mark.line + 1}"
                raise ConfigError(f"{self.where(key)}: {twice}; keep one")


class _Dumper(yaml.SafeDumper):
    """Quotes text that the loader would read as a number."""


for _class in (_Loader, _Dumper):
    _class.add_implicit_resolver(
        "tag:yaml.org,2002:float", re.compile(r"^[-+]?[0-9][0-9_]*(\.[0-9_]*)?[eE][-+]?[0-9]+$"), list("-+0123456789")
    )


def yaml_value(text: str) -> Any:
    """Return the value that YAML reads in this text: 3, 1e-5, true, [a, b], or the text itself if it is not YAML."""
    try:
        with _no_yaml_errors("value"):
            return yaml.load(text, _Loader)  # a SafeLoader
    except ConfigError:
        return text


def read_settings(
    path: str, options: dict[str, Option], open_keys: bool, megatron: dict[str, Given] | None = None
) -> tuple[dict[str, Entry], dict[str, Any]]:
    """Return the settings of a file by name, and (with open_keys) unknown keys as plain values.

    Raise ConfigError with file and line for invalid YAML, a file that is no mapping, unknown keys, or a setting given twice.
    megatron: receives flags of Megatron that are not ours; None: they are unknown.
    """
    text = read_text(path)
    _check_text(text, path)
    with _no_yaml_errors(path):
        loader = _Loader(text)
        loader.path = path
        top = loader.get_single_node() or yaml.MappingNode("tag:yaml.org,2002:map", [])  # None: an empty file
        if not isinstance(top, yaml.MappingNode):
            raise ConfigError(f"{path}: holds no settings; write lines such as `name: value`")
        _check_size(top, path)
        return _Reading(loader, options, megatron).settings(top, open_keys)


def read_mapping(path: str) -> dict[str, Any]:
    """Return the mapping of a YAML or JSON file of another tool, as plain values. Raise ConfigError with file and line."""
    text = read_text(path)
    _check_text(text, path)
    with _no_yaml_errors(path):
        loader = _Loader(text)
        loader.path = path
        top = loader.get_single_node()
        if not isinstance(top, yaml.MappingNode):
            raise ConfigError(f"{path}: holds no settings; write lines such as `name: value`")
        _check_size(top, path)
        return loader.construct_document(top)


def write_settings(
    sections: tuple[type, ...], values: dict[str, Any], options: dict[str, Option], others: dict[str, Any]
) -> str:
    """Return YAML text by section, which read_settings reads back to the same values. A required setting without value is a comment."""
    text = _dump(others) if others else ""
    for section in sections:
        names = [name for name, option in options.items() if option.section is section]
        entries = [_dump({name: values[name]}) if name in values else f"# {name}:  (required)\n" for name in names]
        text += f"{section_name(section)}:\n" + textwrap.indent("".join(entries), "  ")
    return text


_MOST_CHARACTERS, _DEEPEST = 10_000_000, 200


def _check_text(text: str, path: str) -> None:
    """Raise ConfigError for what would keep PyYAML busy for hours: its time grows with the square of the nesting."""
    if len(text) > _MOST_CHARACTERS:
        raise ConfigError(f"{path}: {len(text):,} characters, more than settings take; is it the right file?")
    steps = (1 if bracket in "[{" else -1 for bracket in re.findall(r"[][{}]", text))
    deepest_line = max(map(len, re.findall(r"(?m)^ +", text)), default=0)
    if max(deepest_line, max(itertools.accumulate(steps), default=0)) > _DEEPEST:
        raise ConfigError(f"{path}: lists or mappings nested more than {_DEEPEST} deep; write it flatter")


_MOST_VALUES = 100_000
"""What a file may hold with its aliases written out; real ones hold hundreds."""


def _check_size(top: yaml.Node, path: str) -> None:
    """Raise ConfigError if aliases expand to too much: nested ones multiply, one inside itself never ends."""
    sizes: dict[int, float] = {}

    def size(node: yaml.Node) -> float:
        if id(node) not in sizes:
            sizes[id(node)] = math.inf  # found again before its size is known: an alias inside its own anchor
            inner = node.value if isinstance(node, yaml.CollectionNode) else []
            parts = (part for entry in inner for part in (entry if isinstance(entry, tuple) else (entry,)))
            sizes[id(node)] = 1 + sum(map(size, parts))
        return sizes[id(node)]

    if size(top) > _MOST_VALUES:
        raise ConfigError(f"{path}: its aliases expand to more than {_MOST_VALUES:,} values; write the values out")


class _Reading:
    """Settings found so far, and keys that are none."""

    def __init__(self, loader: _Loader, options: dict[str, Option], megatron: dict[str, Given] | None):
        self.loader, self.options, self.megatron = loader, options, megatron
        self.sections = {section_name(option.section): option.section for option in options.values()}
        self.found: dict[str, Entry] = {}
        self.wrong: list[tuple[str, Wrong]] = []
        """With their places."""

    def settings(self, top: yaml.MappingNode, open_keys: bool) -> tuple[dict[str, Entry], dict[str, Any]]:
        others: dict[str, Any] = {}
        for written, node, where in self.loader.pairs(top):
            key, inverse = self._current(written)
            if key in self.sections and isinstance(node, yaml.MappingNode):
                self._section(key, node)
            elif key in self.sections and key not in self.options:
                if node.tag != "tag:yaml.org,2002:null":  # an empty section is valid
                    raise ConfigError(f"{where}: {key} is a section; write its settings below it, indented")
            elif open_keys and key not in self.options:
                others[key] = self.loader.construct_object(node, deep=True)
            else:
                self._setting(key, inverse, node, where)
        self._refuse()
        return self.found, others

    def _section(self, section: str, top: yaml.MappingNode) -> None:
        for written, node, where in self.loader.pairs(top):
            name, inverse = self._current(written)
            if name in self.options and self.options[name].section is not self.sections[section]:
                right = section_name(self.options[name].section)
                raise ConfigError(f"{where}: {name} belongs in {right}, not in {section}")
            self._setting(name, inverse, node, where, f" in {section}")

    def _setting(self, name: str, inverse: bool, node: yaml.Node, where: str, inside: str = "") -> None:
        if name in self.options:
            self._put(name, Entry(_value(self.loader, node, inverse), where))
        elif self.megatron is not None and name in MEANS:
            ours, value = MEANS[name]
            if self.loader.construct_object(node, deep=True):
                self._put(ours, Entry(value, where))
        elif self.megatron is not None and find(name):
            self._foreign(name, self.loader.construct_object(node, deep=True), where, self.megatron)
        else:
            known = [*self.options, *([] if inside else self.sections), *([] if self.megatron is None else accepted())]
            self.wrong.append((where, Wrong(name + inside, suggestion(name, known))))

    def _foreign(self, name: str, value: Any, where: str, megatron: dict[str, Given]) -> None:
        if value is None or value is False:
            return  # as where it is not given
        if why := refusal(name, value):
            self.wrong.append((where, Wrong(name, refused=why)))
        else:
            megatron[name] = Given(value, f"{where}: {name}", 1)

    def _current(self, written: str) -> tuple[str, bool]:
        """Return the name that a key has now, and whether its value means the contrary there."""
        if self.megatron is not None and written not in self.options:
            written = SAME.get(written, written)
        name = current(written, {*self.options, *(f"no_{option}" for option in self.options)})
        inverse = name != written and name not in self.options
        return (name.removeprefix("no_"), True) if inverse else (name, False)

    def _put(self, name: str, entry: Entry) -> None:
        if name in self.found:
            raise ConfigError(f"{entry.where}: {name} is given twice, first in {self.found[name].where}; keep one")
        self.found[name] = entry

    def _refuse(self) -> None:
        """Raise ConfigError about all keys that are not taken, each with its line."""
        if len(self.wrong) == 1:
            where, wrong = self.wrong[0]
            raise ConfigError(f"{where}: {refused_names('key', [wrong])}")
        if self.wrong:
            named = [
                wrong._replace(name=f"{wrong.name} in line {where.rpartition(' ')[2]}") for where, wrong in self.wrong
            ]
            raise ConfigError(f"{self.loader.path}: {refused_names('key', named)}")


def _value(loader: _Loader, node: yaml.Node, inverse: bool) -> Any:
    value = loader.construct_object(node, deep=True)
    return not value if inverse and isinstance(value, bool) else value


@contextlib.contextmanager
def _no_yaml_errors(path: str) -> Iterator[None]:
    """Convert PyYAML's errors, which have several lines, to ConfigError with file and line."""
    try:
        yield
    except yaml.MarkedYAMLError as error:
        where = f"{path}, line {error.problem_mark.line + 1}" if error.problem_mark else path
        raise ConfigError(f"{where}: not valid YAML ({error.problem}); check indentation, colons and quotes") from None
    except yaml.YAMLError as error:
        raise ConfigError(f"{path}: not valid YAML ({' '.join(str(error).split())})") from None


def _dump(value: Any) -> str:
    return yaml.dump(_plain(value), Dumper=_Dumper, sort_keys=False, allow_unicode=True, width=1 << 20)


def _plain(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _plain(inner) for key, inner in value.items()}
    if isinstance(value, list | tuple | set | frozenset):
        return [_plain(inner) for inner in value]
    return value if isinstance(value, str | int | float | bool | None) else str(value)
