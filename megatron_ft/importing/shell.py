"""Follows a shell script up to its commands without running any: assignments, conditions, loops and functions are evaluated.

What cannot be known is not guessed: a condition over files or programs is left open, and both of its branches are skipped with a note.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field
from fnmatch import fnmatchcase
from pathlib import Path

from megatron_ft.errors import ConfigError
from megatron_ft.files import read_text
from megatron_ft.importing.shell_syntax import Node, parse, tokens
from megatron_ft.importing.shell_words import Variables, arithmetic, expand, unknown, unknowns, value

_ASSIGNMENT = re.compile(r"([A-Za-z_]\w*)(\+?)=(.*)", re.DOTALL)
_DECLARE = ("export", "declare", "local", "readonly", "typeset")
_QUIET = (
    "echo",
    "printf",
    "cd",
    "mkdir",
    "set",
    "ulimit",
    "module",
    "unset",
    "sleep",
    "cat",
    "ls",
    "date",
    "trap",
    "wait",
    "pushd",
    "popd",
)
_LONGEST = 1_000_000
"""Characters of a variable."""
_MOST = 10_000
"""Statements that are followed: a loop without an end stops here."""


@dataclass
class Called:
    """A command as the script would run it. environment: what is set in front of it."""

    words: list[str]
    line: int
    environment: dict[str, str] = field(default_factory=dict)


class _Exit(Exception):
    """The script ends. where: file and line of the `exit`."""

    def __init__(self, where: str):
        self.where = where


class Script:
    """The state of a script that is followed. calls: the commands so far. notes: what could not be followed, with its line."""

    def __init__(self, path: str, given: dict[str, str], arguments: list[str]):
        self.path = path
        self.variables = Variables(dict(given), list(arguments), folder=str(Path(path).parent))
        self.calls: list[Called] = []
        self.notes: list[str] = []
        self.unknown_lines: dict[str, int] = {}
        """Name of an unknown value -> line of its first use."""
        self.ended: str | None = None
        """Place of the `exit` that ended the script."""
        self._here = path
        self._given, self._count, self._depth = set(given), 0, 0
        self._functions: dict[str, list[Node]] = {}

    def follow(self, text: str, path: str) -> None:
        """Follow a text. Raise ConfigError for what is no script."""
        try:
            self.run(parse(text, path))
        except _Exit as end:
            self.ended = end.where
        except RecursionError:
            raise ConfigError(
                f"{path}: nested too deeply to be read; save the training command alone in a file"
            ) from None

    def run(self, nodes: list[Node]) -> bool | None:
        """Follow statements. Return whether the last one succeeds; None: not known."""
        status: bool | None = True
        for node in nodes:
            status = self.one(node)
        return status

    def one(self, node: Node) -> bool | None:
        self._count += 1
        if self._count > _MOST:
            raise ConfigError(f"{self.path}, line {node.line}: a loop here has no end that can be known")
        return getattr(self, f"_{node.kind}")(node)

    def _group(self, node: Node) -> bool | None:
        return self.run(node.parts[0][1])

    def _function(self, node: Node) -> bool:
        self._functions[node.words[0]] = node.parts[0][1]
        return True

    def _not(self, node: Node) -> bool | None:
        status = self.one(node.parts[0][1])
        return None if status is None else not status

    def _chain(self, node: Node) -> bool | None:
        """Follow `a && b || c` and pipes. In a statement, a command of unknown outcome succeeds."""
        status: bool | None = True
        for sign, part in node.parts:
            if (sign == "&&" and status is False) or (sign == "||" and status is not False):
                if sign == "||" and status is None and part.kind == "simple" and part.words[:1] == ["[["]:
                    status = True if self.one(part) else None
                continue
            result = self.one(part)
            status = None if sign in ("|", "|&") or (status is None and result) else result
        return status

    def _if(self, node: Node) -> bool | None:
        for condition, body in node.parts:
            status = self.run(condition)
            if status is None:
                self._skip(node)
                return None
            if status:
                return self.run(body)
        return self.run(node.otherwise)

    def _skip(self, node: Node) -> None:
        """Leave out a statement whose condition is not known, and what it would set."""
        bodies = [*(body for _, body in node.parts), node.otherwise]
        names = sorted({name for body in bodies for name in _assigned(body)})
        if names:
            self.notes.append(f"line {node.line}: what is set there depends on files or programs: {', '.join(names)}")
        for name in names:
            if name not in self.variables.values:
                self.variables.values[name] = unknown(name)
                self.unknown_lines.setdefault(name, node.line)

    def _case(self, node: Node) -> bool | None:
        subject = value(node.words[0], self.variables)
        if unknowns(subject):
            self._skip(node)
            return None
        for patterns, body in node.parts:
            if any(fnmatchcase(subject, value(one, self.variables)) for one in patterns):
                return self.run(body)
        return True

    def _while(self, node: Node) -> bool | None:
        condition, body = node.parts[0]
        while (status := self.run(condition)) is (node.kind == "while"):
            self.run(body)
        if status is None:
            self._skip(node)
        return status

    _until = _while

    def _for(self, node: Node) -> bool | None:
        name, *words = node.words
        for one in [part for word in words for part in expand(word, self.variables)]:
            self.variables.values[name] = one
            self.run(node.parts[0][1])
        return True

    def _simple(self, node: Node) -> bool | None:
        words, set_before = list(node.words), {}
        while words and (match := _ASSIGNMENT.fullmatch(words[0])):
            set_before[match[1]] = words.pop(0)
        if not words:
            for word in set_before.values():
                self._assign(word, node.line)
            return True
        environment = {name: value(word.partition("=")[2], self.variables) for name, word in set_before.items()}
        if words[0] == "((":
            number = arithmetic(words[1], self.variables)
            return None if number is None else bool(number)
        if words[0] in ("[[", "[", "test"):
            return self._test(words)
        if words[0] in _DECLARE:
            for word in words[1:]:
                if _ASSIGNMENT.fullmatch(word):
                    self._assign(word, node.line)
            return True
        return self._call(words, node.line, environment)

    def _assign(self, word: str, line: int) -> None:
        match = _ASSIGNMENT.fullmatch(word)
        assert match
        name, more, text = match.groups()
        if name in self._given and not more:
            return
        before = self.variables.values.get(name)
        if text.startswith("("):
            inner = [one.text for one in tokens(text[1:-1]) if not one.operator]
            items = [part for one in inner for part in expand(one, self.variables)]
            kept = before if isinstance(before, list) else [before] if before else []
            self.variables.values[name] = kept + items if more else items
            return
        found = value(text, self.variables)
        if ((names := unknowns(found)) and found == unknown(names[0])) or re.fullmatch("<[^<>|]+>", found):
            self.unknown_lines.setdefault(name, line)
            found = unknown(name)  # FOLDER=$1 is better known as FOLDER
        if isinstance(before, list) and more:
            self.variables.values[name] = [*before, found]
        else:
            self.variables.values[name] = (before if isinstance(before, str) and more else "") + found
        if sum(map(len, self.variables.values[name])) > _LONGEST:
            raise ConfigError(
                f"{self.path}, line {line}: {name} grows beyond {_LONGEST:,} characters; is it a loop without an end?"
            )

    def _call(self, words: list[str], line: int, environment: dict[str, str]) -> bool | None:
        """Follow a builtin or a function, or remember a command."""
        fields = [part for word in words for part in expand(word, self.variables)]
        for name in (name for one in fields for name in unknowns(one)):
            self.unknown_lines.setdefault(name, line)
        name, rest = (fields[0], fields[1:]) if fields else ("", [])
        if name in ("true", ":", "false"):
            return name != "false"
        if name in ("exit", "return"):
            raise _Exit(f"{self._here}, line {line}")
        if name == "shift":
            count = int(rest[0]) if rest and rest[0].isdigit() else 1
            if count > len(self.variables.arguments):
                return False
            del self.variables.arguments[:count]
            return True
        if name in ("source", "."):
            return self._source(rest[0] if rest else "", line)
        if name in self._functions:
            return self._in_function(name, rest)
        if (inner := _script_within(fields)) is not None:
            self._depth += 1
            if self._depth < 10:
                self.run(parse(inner, self.path))
            self._depth -= 1
            return None
        if fields and name not in _QUIET:
            exported = {key: text for key, text in self.variables.values.items() if isinstance(text, str)}
            self.calls.append(Called(fields, line, {**exported, **environment}))
        return True if name in _QUIET else None

    def _in_function(self, name: str, arguments: list[str]) -> bool | None:
        own, self.variables.arguments = self.variables.arguments, arguments
        self._depth += 1
        try:
            return self.run(self._functions[name]) if self._depth < 10 else None
        except _Exit:
            return None  # `return` of the function, or an `exit` in a help text
        finally:
            self.variables.arguments = own
            self._depth -= 1

    def _source(self, name: str, line: int) -> bool | None:
        place = Path(name) if name.startswith(self.variables.folder) else Path(self.path).parent / name
        if name and not unknowns(name) and place.is_file() and self._depth < 10:
            self._depth, outside, self._here = self._depth + 1, self._here, str(place)
            self.run(parse(read_text(place), str(place)))
            self._depth, self._here = self._depth - 1, outside
            return True
        self.notes.append(f"line {line}: another file is read here that is not here; name its variables with --set")
        self.variables.open = True
        return None

    def _test(self, words: list[str]) -> bool | None:
        """Return the value of `[ ... ]` or `[[ ... ]]`; None: not known."""
        inside = [word for word in words[1:] if word not in ("]", "]]")]
        for sign, pick in (("||", any), ("-o", any), ("&&", all), ("-a", all)):
            if sign in inside:
                at = inside.index(sign)
                return _both(pick, self._test(["[", *inside[:at]]), self._test(["[", *inside[at + 1 :]]))
        if inside[:1] == ["!"]:
            status = self._test(["[", *inside[1:]])
            return None if status is None else not status
        return self._comparison(inside)

    def _comparison(self, words: list[str]) -> bool | None:
        if len(words) == 1:
            words = ["-n", *words]
        if len(words) == 2:
            return self._about_one(*words)
        if len(words) != 3:
            return self._about_one(words[0], '""') if len(words) == 1 else None
        left, sign, right = self._tested(words[0]), words[1], self._tested(words[2])
        if unknowns(left + right):
            return None
        if sign in ("=", "==", "!="):
            return fnmatchcase(left, right) == (sign != "!=")
        if sign == "=~":
            return None
        numbers = arithmetic(left, self.variables), arithmetic(right, self.variables)
        compare = {"-eq": "==", "-ne": "!=", "-gt": ">", "-ge": ">=", "-lt": "<", "-le": "<="}.get(sign)
        if compare is None or None in numbers:
            return None
        return bool(arithmetic(f"{numbers[0]} {compare} {numbers[1]}", self.variables))

    def _about_one(self, sign: str, word: str) -> bool | None:
        if sign == "-v":
            return self.variables.get(word) is not None
        if sign not in ("-z", "-n"):
            return None
        text = self._tested(word)
        return None if unknowns(text) else bool(text) == (sign == "-n")

    def _tested(self, word: str) -> str:
        """Return a word of a test, in which a variable that the script does not set is empty."""
        text = value(word, self.variables)
        for name in unknowns(text):
            if self.variables.get(name) is None and not self.variables.open and re.fullmatch(r"\w+", name):
                text = text.replace(unknown(name), "")
        return text


def _both(pick: Callable[[Iterable], bool], one: bool | None, other: bool | None) -> bool | None:
    """Return `and` or `or` (all, any) of two truths of which each may be unknown."""
    known = [status for status in (one, other) if status is not None]
    if len(known) == 2 or (known and known[0] == (pick is any)):
        return pick(known)
    return None


def _script_within(fields: list[str]) -> str | None:
    """Return the text that eval or `bash -c` would run as a script."""
    if fields[:1] == ["eval"]:
        return " ".join(fields[1:])
    for shell in ("bash", "sh"):
        names = [Path(one).name for one in fields]
        if (
            shell in names
            and (at := names.index(shell)) + 2 < len(fields)
            and fields[at + 1].startswith("-")
            and "c" in fields[at + 1]
        ):
            return fields[at + 2]
    return None


def _assigned(nodes: list[Node]) -> Iterator[str]:
    """Yield the names of the variables that statements set."""
    for node in nodes:
        for word in node.words if node.kind == "simple" else []:
            if match := _ASSIGNMENT.fullmatch(word):
                yield match[1]
        for _, body in node.parts:
            yield from _assigned(body if isinstance(body, list) else [body])
        yield from _assigned(node.otherwise)
