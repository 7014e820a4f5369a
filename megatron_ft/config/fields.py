"""Reads dataclass sections: one Option per field, with the help text from the string literal below the field.

It does not depend on argparse, YAML or any particular section.
"""

import ast
import dataclasses
import functools
import inspect
import itertools
import re
import sys
import types
import typing
from dataclasses import dataclass
from typing import Any, Literal

MISSING = dataclasses.MISSING
_SUFFIX = re.compile(r"_(config|section|options|settings)$")


@dataclass(frozen=True)
class Option:
    """One setting: a flag on the command line, a key in a YAML file."""

    name: str
    type: Any
    """As annotated, Optional included."""
    default: Any
    """MISSING where there is none."""
    required: bool
    """Whether the setting must be given. A default of such a field is not used."""
    help: str
    section: type
    writes: Literal["folder", "file", "prefix"] | None = None
    """What the command writes under this name: a folder, a file, or files that begin so (prefix). Checked before the command starts."""
    instead: str | None = None
    """Another setting that may be given in its place."""

    @property
    def bare_type(self) -> Any:
        """The type without `| None`."""
        inner = [kind for kind in typing.get_args(self.type) if kind is not types.NoneType]
        return inner[0] if self._is_union and len(inner) == 1 else self.type

    @property
    def optional(self) -> bool:
        """Return whether None is a value of this setting."""
        return self.default is None or (self._is_union and types.NoneType in typing.get_args(self.type))

    @property
    def _is_union(self) -> bool:
        return typing.get_origin(self.type) in (typing.Union, types.UnionType)

    @property
    def is_switch(self) -> bool:
        """A flag without a value: `--x` and `--no_x`."""
        return self.bare_type is bool

    @property
    def is_list(self) -> bool:
        """A flag with any number of values: `--x a b`."""
        return typing.get_origin(self.bare_type) in (list, tuple, set) or self.bare_type in (list, tuple, set)


def members(section: type) -> dict[str, type]:
    """Return the sections in a group of sections, by field; {} for a section of settings."""
    hints = typing.get_type_hints(section)
    kinds = {field.name: hints[field.name] for field in dataclasses.fields(section)}
    return kinds if kinds and all(dataclasses.is_dataclass(kind) for kind in kinds.values()) else {}


def flat(sections: tuple[type, ...]) -> tuple[type, ...]:
    """Return the sections in order, each group replaced by its members."""
    return tuple(kind for section in sections for kind in members(section).values() or (section,))


def options_of(sections: tuple[type, ...]) -> dict[str, Option]:
    """Return every setting of these sections and groups by name, in order. Raise ValueError for a name in two sections, which is a bug."""
    found: dict[str, Option] = {}
    for section in flat(sections):
        for option in _section_options(section):
            if option.name in found:
                raise ValueError(f"{option.name} is a field of both {found[option.name].section} and {section}")
            if option.name in ("print_config", "help"):
                raise ValueError(f"{section.__name__}.{option.name}: this name is every command's own")
            found[option.name] = option
    return found


def section_name(section: type) -> str:
    """Return the key of a section in a YAML file: "optimizer" for class OptimizerConfig."""
    snake = re.sub(r"(?<=[a-z0-9])(?=[A-Z])|(?<=[A-Z])(?=[A-Z][a-z])", "_", section.__name__).lower()
    return _SUFFIX.sub("", snake).lstrip("_")


def section_title(section: type) -> str:
    """Return the first line of the section's docstring, else its name."""
    doc = section.__doc__ or ""
    if not doc.strip() or doc.startswith(section.__name__ + "("):  # without a docstring dataclass() writes a signature
        return section_name(section).replace("_", " ")
    return doc.strip().splitlines()[0].rstrip(".")


def default_of(option: Option) -> Any:
    """Return the default value, from the factory if the field has one; MISSING if there is none."""
    return option.default() if isinstance(option.default, _Factory) else option.default


@dataclass(frozen=True)
class _Factory:
    make: Any

    def __call__(self) -> Any:
        return self.make()


def _section_options(section: type) -> list[Option]:
    hints, helps = typing.get_type_hints(section), field_docs(section)
    options = []
    for field in dataclasses.fields(section):
        if not field.init:
            continue
        default = field.default if field.default_factory is MISSING else _Factory(field.default_factory)
        required = default is MISSING or bool(field.metadata.get("required"))
        writes, instead = field.metadata.get("writes"), field.metadata.get("instead")
        text = helps.get(field.name, "")
        options.append(Option(field.name, hints[field.name], default, required, text, section, writes, instead))
    return options


def field_docs(section: type) -> dict[str, str]:
    """Return the string literal below each field, inherited ones included, with white space folded. {} without source."""
    docs: dict[str, str] = {}
    for base in reversed(section.__mro__[:-1]):
        node = _class_nodes(base.__module__).get(base.__qualname__)
        body = node.body if node else []
        for pair in itertools.pairwise(body):
            match pair:
                case ast.AnnAssign(target=ast.Name(id=name)), ast.Expr(value=ast.Constant(value=str(text))):
                    docs[name] = " ".join(text.split())
    return docs


@functools.cache
def _class_nodes(module: str) -> dict[str, ast.ClassDef]:
    try:
        tree = ast.parse(inspect.getsource(sys.modules[module]))
    except (OSError, TypeError, KeyError):
        return {}
    found: dict[str, ast.ClassDef] = {}
    _collect(tree, "", found)
    return found


def _collect(node: ast.AST, prefix: str, found: dict[str, ast.ClassDef]) -> None:
    for child in ast.iter_child_nodes(node):
        if isinstance(child, ast.ClassDef):
            found[prefix + child.name] = child
            _collect(child, f"{prefix}{child.name}.", found)
        elif isinstance(child, ast.FunctionDef | ast.AsyncFunctionDef):
            _collect(child, f"{prefix}{child.name}.<locals>.", found)
        elif isinstance(child, ast.stmt):
            _collect(child, prefix, found)
