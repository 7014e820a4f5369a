"""Turns the text of a flag, or a value from YAML, into a value of the field's type, with Pydantic and our error messages."""

import functools
import re
import typing
from pathlib import Path
from typing import Any

from megatron_ft.config.fields import Option
from megatron_ft.config.hints import nearest
from megatron_ft.errors import ConfigError

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
        inner = typing.get_args(option.bare_type)[:1] or (str,)
        return checked(option, [_raw(inner[0], one) for one in text], where)
    return checked(option, _raw(option.bare_type, text), where)


def checked(option: Option, value: Any, where: str) -> Any:
    """Return the value in the type of the field (a whole number for a float field, text for a Path, "1e-5" for a float).

    Raise ConfigError. where: the flag, or the line and file, for the message.
    """
    if value is None and option.optional:
        return None
    choices = typing.get_args(option.bare_type) if typing.get_origin(option.bare_type) is typing.Literal else ()
    if choices and value not in choices:
        names = [str(choice) for choice in choices]
        raise ConfigError(f"{where}: {value!r} is none of {', '.join(names)}{nearest(str(value), names)}")
    if isinstance(value, bool) and option.bare_type in (int, float):  # pydantic would convert true to 1
        raise ConfigError(f"{where}: {value!r} is not {_WORDS[option.bare_type]}")
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


def unquoted(text: str) -> str:
    """Return text without one pair of quotes around it: model cards show flags quoted twice, as in --x "\\"<a>,<b>\\""."""
    return text[1:-1] if len(text) > 1 and text[0] == text[-1] and text[0] in "\"'" else text


def _raw(kind: Any, text: str) -> Any:
    if kind in (str, Path):
        return unquoted(text)
    if typing.get_origin(kind) is typing.Literal:
        return next((choice for choice in typing.get_args(kind) if str(choice) == unquoted(text)), unquoted(text))
    if kind in (int, float):
        return _number(text)
    from megatron_ft.config.yaml_file import yaml_value

    return yaml_value(text)  # a mapping, a union: written as in the file


def _number(text: str) -> Any:
    # 1e3 is a fine way to write a whole number, in a file and in a flag alike
    return float(text) if re.fullmatch(r"[-+]?\d+(\.\d*)?[eE][-+]?\d+", text) else text


@functools.cache
def _adapter(kind: Any) -> Any:
    from pydantic import TypeAdapter

    return TypeAdapter(kind)
