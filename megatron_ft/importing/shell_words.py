"""Expands words of a shell script: quotes, variables, arrays, `${X:-default}` and arithmetic. Nothing is run.

A value that the script does not give stays as a mark with its name, which `unknowns` finds and `shown` writes as plain text.
"""

from __future__ import annotations

import ast
import operator
import re
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from fnmatch import fnmatchcase

from megatron_ft.importing.shell_syntax import after, closing_of

_OPEN, _CLOSE = "\ue000", "\ue001"
_MARK = re.compile(f"{_OPEN}([^{_CLOSE}]*){_CLOSE}")
_NAME = re.compile(r"[A-Za-z_]\w*|\d|[@*#?$!-]")
_INSIDE = re.compile(r"(#?)([A-Za-z_]\w*|\d+|[@*#?])(\[([^\]]*)\])?(.*)", re.DOTALL)
_BREAK = "\ue002"
"""Between elements of "${ARRAY[@]}"."""


def unknown(name: str) -> str:
    """Return the mark of a value that is not known."""
    return f"{_OPEN}{name}{_CLOSE}"


def unknowns(text: str) -> list[str]:
    """Return the names of the values in a text that are not known."""
    return _MARK.findall(text)


def shown(text: str) -> str:
    """Return the text with the names of unknown values in capitals: /data/NAME."""
    return _MARK.sub(lambda match: re.sub(r"\W+", "_", match[1]).strip("_").upper() or "VALUE", text)


@dataclass
class Variables:
    """Variables of a script. values: text, or a list for an array. arguments: $1, $2, ... open: others may be set by files not here."""

    values: dict[str, str | list[str]] = field(default_factory=dict)
    arguments: list[str] = field(default_factory=list)
    open: bool = False
    folder: str = "."
    """Of the script."""
    unset: dict[str, None] = field(default_factory=dict)
    """Names that were asked for and are not set."""

    def get(self, name: str) -> str | list[str] | None:
        """Return a value; None: the script does not set it."""
        if name in self.values:
            return self.values[name]
        if name.isdigit() and name != "0":
            return self.arguments[int(name) - 1] if int(name) <= len(self.arguments) else None
        if name in ("@", "*"):
            return self.arguments
        if name == "#":
            return str(len(self.arguments))
        return {"PWD": ".", "?": "0"}.get(name)


def expand(word: str, variables: Variables) -> list[str]:
    """Return the fields that a word becomes: unquoted expansions are split at blanks, arrays become a field for each element."""
    fields, current, given = [], "", False
    for text, quoted in _pieces(word, variables):
        if quoted:
            first, *others = text.split(_BREAK)
            current, given = current + first, True
            for other in others:
                fields.append(current)
                current = other
            continue
        if text[:1].isspace() and current:
            fields.append(current)
            current, given = "", False
        words = text.replace(_BREAK, " ").split()
        for number, one in enumerate(words):
            if number:
                fields.append(current)
                current = ""
            current += one
        if words and text[-1].isspace():
            fields.append(current)
            current, given = "", False
    return [*fields, current] if current or given else fields


def value(word: str, variables: Variables) -> str:
    """Return a word as one text, as on the right of `=`."""
    return "".join(text for text, _ in _pieces(word, variables)).replace(_BREAK, " ")


def _pieces(word: str, variables: Variables, inside: bool = False) -> Iterator[tuple[str, bool]]:
    """Yield (text, quoted). inside: between double quotes."""
    place = 0
    while place < len(word):
        char = word[place]
        if char == "\\":
            escaped = word[place + 1 : place + 2]
            yield ("" if escaped == "\n" else escaped if not inside or escaped in '$`"\\' else char + escaped), True
            place += 2
        elif char == "'" and not inside:
            end = after(word, place)
            yield word[place + 1 : end - 1], True
            place = end
        elif char == '"' and not inside:
            end = closing_of(word, place + 1, '"')
            inner = list(_pieces(word[place + 1 : end - 1], variables, True))
            if inner != [(_BREAK, True)]:  # "${EMPTY[@]}" is no word at all
                yield "", True
                yield from ((text, quoted) for text, quoted in inner if text != _BREAK)
            place = end
        elif char == "`" or word.startswith(("$(", "<(", ">("), place):
            end = after(word, place)
            yield _substituted(word[place:end], variables), inside
            place = end
        elif word.startswith("${", place):
            end = after(word, place)
            yield _braced(word[place + 2 : end - 1], variables, inside), inside
            place = end
        elif char == "$" and (name := _NAME.match(word, place + 1)):
            yield _plain(name[0], variables, inside), inside
            place = name.end()
        else:
            yield char, True
            place += 1


def _substituted(text: str, variables: Variables) -> str:
    """Return the value of `$(( ))`; that of a command is not known."""
    if text.startswith("$((") and (number := arithmetic(text[3:-2], variables)) is not None:
        return str(number)
    if "dirname" in text and ("$0" in text or "BASH_SOURCE" in text):
        return variables.folder
    return unknown(text)


def _joined(found: str | list[str], inside: bool) -> str:
    return found if isinstance(found, str) else (_BREAK if inside else " ").join(found)


def _plain(name: str, variables: Variables, inside: bool, whole: bool = True) -> str:
    found = variables.get(name)
    if found is None:
        variables.unset[name] = None
        return unknown(name)
    if isinstance(found, list) and name not in "@*":
        found = found[0] if found else ""
    return (_BREAK if inside else "") if found == [] else _joined(found, inside)


def _braced(text: str, variables: Variables, inside: bool) -> str:
    """Return the value of `${...}`."""
    match = _INSIDE.fullmatch(text)
    if not match:
        return unknown(text)
    length, name, _, index, rest = match.groups()
    found = variables.get(name)
    if length:
        return unknown(name) if found is None else str(len(found))
    if index in ("@", "*"):
        items = [found] if isinstance(found, str) else found
        return unknown(name) if items is None else _joined(items, inside) if items else (_BREAK if inside else "")
    if index is not None:
        return _element(name, index, variables)
    change = next((sign for sign in (":-", ":=", ":+", ":?", "-", "=", "+", "?") if rest.startswith(sign)), None)
    if change:
        return _with_default(name, found, change, rest[len(change) :], variables)
    if not rest:
        return _plain(name, variables, inside)
    return _cut(name, found, rest, variables)


def _element(name: str, index: str, variables: Variables) -> str:
    found, number = variables.get(name), arithmetic(index, variables)
    if not isinstance(found, list) or number is None or not -len(found) <= number < len(found):
        return unknown(f"{name}[{index}]")
    return found[number]


def _with_default(name: str, found: str | list[str] | None, sign: str, text: str, variables: Variables) -> str:
    """Return `${X:-text}` and its relatives. A variable that the script does not set counts as not set."""
    if found is None:
        variables.unset[name] = None
        if variables.open and sign[-1] in "-=":
            return unknown(name)
    has = bool(found) if sign[0] == ":" else found is not None
    if sign[-1] == "+":
        return value(text, variables) if has else ""
    if has and found is not None:
        return _joined(found, False)
    if sign[-1] == "?":
        return unknown(name)
    default = value(text, variables)
    if sign[-1] == "=":
        variables.values[name] = default
    return default


def _cut(name: str, found: str | list[str] | None, rest: str, variables: Variables) -> str:
    """Return `${X#pattern}`, `${X%pattern}`, `${X/old/new}` and `${X,,}`."""
    if not isinstance(found, str) or unknowns(found) or len(found) > 5000:
        return unknown(name)
    sign = re.match(r"##?|%%?|//?|,,|\^\^", rest)
    if not sign:
        return unknown(name)
    if sign[0] in (",,", "^^"):
        return found.lower() if sign[0] == ",," else found.upper()
    pattern = value(rest[sign.end() :], variables)
    if sign[0][0] == "/":
        old, _, new = pattern.partition("/")
        return found.replace(old, new, -1 if sign[0] == "//" else 1) if not set(old) & set("*?[") else unknown(name)
    cuts = [(found[:place], found[place:]) for place in range(len(found) + 1)]
    ends = sign[0][0] == "%"
    fitting = [(head if ends else tail) for head, tail in cuts if fnmatchcase(tail if ends else head, pattern)]
    longest = len(sign[0]) == 2
    return (min if longest else max)(fitting, key=len) if fitting else found


_OPERATIONS: dict[type, Callable] = {
    ast.Add: operator.add, ast.Sub: operator.sub, ast.Mult: operator.mul, ast.Mod: operator.mod, ast.Eq: operator.eq,
    ast.NotEq: operator.ne, ast.Lt: operator.lt, ast.LtE: operator.le, ast.Gt: operator.gt, ast.GtE: operator.ge,
}  # fmt: skip


def arithmetic(text: str, variables: Variables) -> int | None:
    """Return the value of an arithmetic expression; None: it has unknown parts, or parts that are not read here."""
    plain = value(text, variables).replace("&&", " and ").replace("||", " or ")
    if unknowns(plain) or len(plain) > 1000:
        return None
    try:
        found = _number(ast.parse(plain.strip() or "0", mode="eval").body, variables)
        return found if abs(found) < 1 << 63 else None
    except (SyntaxError, ValueError, ZeroDivisionError, RecursionError, KeyError):
        return None


def _number(node: ast.AST, variables: Variables) -> int:
    if isinstance(node, ast.Constant) and type(node.value) is int:
        return node.value
    if isinstance(node, ast.Name):
        found = variables.get(node.id)
        return int(found) if isinstance(found, str) else 0
    if isinstance(node, ast.UnaryOp) and isinstance(node.op, ast.USub | ast.Not):
        inner = _number(node.operand, variables)
        return -inner if isinstance(node.op, ast.USub) else int(not inner)
    if isinstance(node, ast.BoolOp):
        parts = [_number(one, variables) for one in node.values]
        return int(all(parts) if isinstance(node.op, ast.And) else any(parts))
    if isinstance(node, ast.Compare) and len(node.ops) == 1:
        return int(
            _OPERATIONS[type(node.ops[0])](_number(node.left, variables), _number(node.comparators[0], variables))
        )
    if isinstance(node, ast.BinOp):
        left, right = _number(node.left, variables), _number(node.right, variables)
        if isinstance(node.op, ast.Div | ast.FloorDiv):
            return int(left / right)
        return int(_OPERATIONS[type(node.op)](left, right))
    raise ValueError("not read here")
