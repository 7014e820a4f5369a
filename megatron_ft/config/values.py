"""Turns the text of a flag, or a value from YAML, into a value of the field's type, with Pydantic and our error messages."""

import functools
import re
import types
import typing
from pathlib import Path
from typing import Any

from megatron_ft.config.fields import Option
from megatron_ft.config.hints import alternatives, meant
from megatron_ft.errors import ConfigError

_WHOLE, _DECIMAL = re.compile(r"[-+]?[0-9]{1,18}"), re.compile(r"[-+]?[0-9]+\.[0-9]*")
_POWER = re.compile(r"[-+]?[0-9]+(\.[0-9]*)?[eE][-+]?[0-9]+")
_WORDS = {
    int: "a whole number",
    float: "a number",
    bool: "true or false",
    str: "text (put it in quotes)",
    Path: "a path",
}


def from_text(option: Option, text: str | list[str], where: str) -> Any:
    """Return the value of a flag's text, or of the texts of a list flag. `null` unsets a setting that may be None."""
    if option.optional and text in ("null", ["null"]):
        return None
    if isinstance(text, list):
        inner = (typing.get_args(option.bare_type) or (str,))[0]
        # A text may hold a comma; a number or one of several words cannot.
        apart = text if inner in (str, Path) else [part for one in text for part in one.split(",")]
        return checked(option, [_raw(inner, one) for one in apart], where)
    return checked(option, _raw(option.bare_type, text), where)


def checked(option: Option, value: Any, where: str) -> Any:
    """Return the value in the type of the field (a whole number for a float field, text for a Path, "1e-5" for a float).

    Raise ConfigError. where: the flag, or the line and file, for the message.
    """
    if value is None and option.optional:
        return None
    choices = typing.get_args(option.bare_type) if typing.get_origin(option.bare_type) is typing.Literal else ()
    if choices and value not in choices:
        names = {str(choice): choice for choice in choices}
        if (known := meant(str(value), names)) is None:
            raise ConfigError(f"{where}: {value!r} is none of {', '.join(names)}{alternatives(str(value), names)}")
        value = names[known]
    if isinstance(value, bool) and option.bare_type in (int, float):  # pydantic would convert true to 1
        raise ConfigError(f"{where}: {value!r} is not {_WORDS[option.bare_type]}")
    if choices:
        return value
    if (found := plain(option.bare_type, value)) is not UNKNOWN:
        return found
    from pydantic import ValidationError

    try:
        return _adapter(option.type).validate_python(value)
    except ValidationError as error:
        first = error.errors(include_url=False)[0]
        reason = _WORDS.get(option.bare_type)
        if first["type"] == "list_type" and not isinstance(value, dict):
            raise ConfigError(f"{where}: {value!r} is not a list; write [{value}]") from None
        if reason:
            raise ConfigError(f"{where}: {value!r} is not {reason}") from None
        raise ConfigError(f"{where}: {first['input']!r}: {first['msg'].lower()}") from None


UNKNOWN = object()


def plain(kind: Any, value: Any) -> Any:
    """Return a value that plainly is of a kind; UNKNOWN where pydantic has to see it, which takes a while to import."""
    origin, inner = typing.get_origin(kind), typing.get_args(kind)
    if kind is Any or type(value) is kind or (value is None and types.NoneType in inner):
        return value
    if kind is Path and type(value) is str:
        return Path(value)
    if origin is typing.Literal:
        return value if type(value) is str and value in inner else UNKNOWN
    if origin is types.UnionType and type(value) in inner:
        return value
    if origin is types.UnionType and len(inner) == 2 and inner[1] is types.NoneType:
        return plain(inner[0], value)
    if origin is list and type(value) is list:
        found = [plain(inner[0], one) for one in value]
        return UNKNOWN if UNKNOWN in found else found
    return UNKNOWN


def unquoted(text: str) -> str:
    """Return text without one pair of quotes around it: model cards show flags quoted twice, as in --x "\\"<a>,<b>\\""."""
    return text[1:-1] if len(text) > 1 and text[0] == text[-1] and text[0] in "\"'" else text


def _raw(kind: Any, text: str) -> Any:
    if kind in (str, Path):
        return unquoted(text)
    if typing.get_origin(kind) is typing.Literal:
        return next((choice for choice in typing.get_args(kind) if str(choice) == unquoted(text)), unquoted(text))
    if kind in (int, float):
        return _number(kind, text)
    from megatron_ft.config.yaml_file import yaml_value

    return yaml_value(text)  # a mapping, a union: written as in the file


def _number(kind: type[int] | type[float], text: str) -> Any:
    """Return the number that a text is; else the text."""
    if _WHOLE.fullmatch(text):
        return kind(text)
    # 1e3 is a fine way to write a whole number, in a file and in a flag alike
    return float(text) if _POWER.fullmatch(text) or (kind is float and _DECIMAL.fullmatch(text)) else text


@functools.cache
def _adapter(kind: Any) -> Any:
    from pydantic import TypeAdapter

    return TypeAdapter(kind)
