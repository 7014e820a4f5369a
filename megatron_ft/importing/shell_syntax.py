"""Reads a shell script into statements, without running anything. Words keep their quotes; shell_words.py expands them.

Known are simple commands, assignments, arrays, if, case, while, until, for, functions, groups, `&&`, `||`, pipes and here-documents.
"""

from __future__ import annotations

import re
from dataclasses import dataclass, field

from megatron_ft.errors import ConfigError

_OPERATOR = re.compile(r"\n|;;&?|;&|&&|\|\||\|&|;|\||&(?!>)|\(\(|\)\)|\(|\)")
_REDIRECT = re.compile(r"(\d*|&)(<<<|<<-?|>>|>&|<&|<|>\|?)")
_ARRAY = re.compile(r"[A-Za-z_]\w*\+?=\(")
_FUNCTION = re.compile(r"[\w.-]+")
_BLANK_TO_FILL = re.compile(r"(^|[\s=])<([A-Za-z][^<>|$\n]*)>(?=[\s;]|$)", re.MULTILINE)
"""NAME=<your path> or --flag <your path>, as examples have it: no value."""


@dataclass(frozen=True)
class Token:
    """text: a word with its quotes, or an operator."""

    text: str
    line: int
    operator: bool = False


@dataclass
class Node:
    """A statement. kind: simple, if, case, while, until, for, function, group or chain.

    words: of a simple command, or the subject of case and for. parts: (condition or patterns, body) pairs; of a chain (operator, node).
    """

    kind: str
    line: int
    words: list[str] = field(default_factory=list)
    parts: list[tuple] = field(default_factory=list)
    otherwise: list[Node] = field(default_factory=list)


def tokens(text: str) -> list[Token]:
    """Cut a script into words and operators. Redirections and comments are left out."""
    found: list[Token] = []
    place, line = 0, 1
    here: list[str] = []
    text = _BLANK_TO_FILL.sub(_named, text.replace("\r\n", "\n"))
    while place < len(text):
        char = text[place]
        if char in " \t" or text.startswith("\\\n", place):
            line += char == "\\"
            place += 2 if char == "\\" else 1
        elif char == "#":
            place = _to(text, "\n", place)
        elif (redirect := _REDIRECT.match(text, place)) and not text.startswith(("<(", ">("), place):
            place = redirect.end()
            start, place = _skip_blanks(text, place), _end_of_word(text, _skip_blanks(text, place))
            if redirect[2] in ("<<", "<<-"):
                here.append(text[start:place].strip("'\"\\"))
        elif text.startswith("((", place):
            end = closing_of(text, place + 1, ")")  # behind both
            found += [Token("((", line, True), Token(text[place + 2 : end - 2], line), Token("))", line, True)]
            line, place = line + text.count("\n", place, end), end
        elif operator := _OPERATOR.match(text, place):
            found.append(Token(operator[0], line, True))
            place = operator.end()
            if operator[0] == "\n":
                line += 1
                for mark in here:
                    end_of_text = re.compile(rf"^\s*{re.escape(mark)}\s*$", re.MULTILINE).search(text, place)
                    stop = end_of_text.end() if end_of_text else len(text)
                    line, place = line + text.count("\n", place, stop), stop
                here = []
        else:
            end = _end_of_word(text, place)
            found.append(Token(text[place:end], line))
            line, place = line + text.count("\n", place, end), end
    return [*found, Token("\n", line, True)]


def _named(match: re.Match) -> str:
    name = re.sub(r"\W+", "_", match[2]).strip("_")[:40]
    return f"{match[1]}${{{name}}}"


def _to(text: str, what: str, place: int) -> int:
    end = text.find(what, place)
    return len(text) if end < 0 else end


def _skip_blanks(text: str, place: int) -> int:
    while place < len(text) and text[place] in " \t":
        place += 1
    return place


def _end_of_word(text: str, place: int) -> int:
    """Return the end of the word that begins here: quotes, `$( )`, `${ }` and `name=( )` belong to it."""
    if array := _ARRAY.match(text, place):
        return closing_of(text, array.end(), ")")
    start = place
    while place < len(text):
        char = text[place]
        if char in " \t\n;|&()" and not (char == "(" and place > start and text[place - 1] in "@?*+!"):
            return place
        if char == "(":  # @(one|other)
            place = closing_of(text, place + 1, ")")
            continue
        place = after(text, place)
    return len(text)


def after(text: str, place: int) -> int:
    """Return the place after one character of a word, or after the quotes or the expansion that begin there."""
    if text[place] == "\\":
        return place + 2
    if text[place] == "'":
        return _to(text, "'", place + 1) + 1
    if text[place] == '"':
        return closing_of(text, place + 1, '"')
    if text[place] == "`":
        return _to(text, "`", place + 1) + 1
    if text.startswith("$((", place):
        return closing_of(text, place + 2, ")")
    if text.startswith(("$(", "<(", ">("), place):
        return closing_of(text, place + 2, ")")
    if text.startswith("${", place):
        return closing_of(text, place + 2, "}")
    return place + 1


def closing_of(text: str, place: int, mark: str) -> int:
    """Return the place after the closing mark of what began before `place`."""
    while place < len(text) and text[place] != mark:
        if mark == ")" and text[place] == "#" and text[place - 1] in " \t\n":
            place = _to(text, "\n", place)
        elif mark == ")" and text[place] == "(":
            place = closing_of(text, place + 1, ")")
        elif mark == '"' and text[place] == "'":
            place += 1
        else:
            place = after(text, place)
    return min(place + 1, len(text))


class Parser:
    """Recursive descent over tokens. path: for messages."""

    def __init__(self, found: list[Token], path: str):
        self.tokens, self.path, self.at = found, path, 0

    def statements(self, *ends: str) -> list[Node]:
        """Return statements up to one of the words or operators `ends`, which is not taken."""
        done = []
        while self.at < len(self.tokens):
            token = self.tokens[self.at]
            if token.text in ends:
                break
            if token.operator and token.text in ("\n", ";", "&"):
                self.at += 1
                continue
            done.append(self.chain())
        return done

    def chain(self) -> Node:
        """Read commands that `&&`, `||` and `|` connect."""
        first = self.command()
        parts: list[tuple] = [("", first)]
        while self.at < len(self.tokens) and self.tokens[self.at].text in ("&&", "||", "|", "|&"):
            operator = self.tokens[self.at].text
            self.at += 1
            self.lines()
            parts.append((operator, self.command()))
        return first if len(parts) == 1 else Node("chain", first.line, parts=parts)

    def command(self) -> Node:
        token = self.tokens[self.at]
        compound = {
            "if": self.branches, "case": self.cases, "while": self.loop, "until": self.loop, "for": self.each, "function": self.function,
        }.get(token.text)  # fmt: skip
        if compound:
            return compound()
        if token.text in ("{", "("):
            self.at += 1
            body = self.statements("}" if token.text == "{" else ")")
            self.at += 1
            return Node("group", token.line, parts=[([], body)])
        if token.text == "((":
            return self.arithmetic()
        if token.operator:
            self.fail(token)
        return self.simple()

    def simple(self) -> Node:
        token, words = self.tokens[self.at], []
        if token.text == "!":
            self.at += 1
            return Node("not", token.line, parts=[("", self.command())])
        test = token.text == "[["
        while self.at < len(self.tokens):
            here = self.tokens[self.at]
            if here.operator and not (test and here.text != "\n"):
                break
            words.append(here.text)
            self.at += 1
            if test and here.text == "]]":
                break
        if len(words) == 1 and self.follows("(", ")") and _FUNCTION.fullmatch(words[0]):
            self.at += 2
            return self.body_of(words[0], token.line)
        return Node("simple", token.line, words)

    def follows(self, *texts: str) -> bool:
        return [one.text for one in self.tokens[self.at : self.at + len(texts)]] == list(texts)

    def function(self) -> Node:
        line = self.tokens[self.at].line
        self.at += 1
        name = self.present(line).text
        self.at += 1
        if self.follows("(", ")"):
            self.at += 2
        return self.body_of(name, line)

    def body_of(self, name: str, line: int) -> Node:
        self.lines()
        return Node("function", line, [name], [([], [self.command()])])

    def arithmetic(self) -> Node:
        token = self.tokens[self.at]
        self.at += 1
        words = []
        while (text := self.present(token.line).text) != "))":
            words.append(text)
            self.at += 1
        self.at += 1
        return Node("simple", token.line, ["((", " ".join(words)])

    def branches(self) -> Node:
        node = Node("if", self.tokens[self.at].line)
        while self.tokens[self.at].text in ("if", "elif"):
            self.at += 1
            condition = self.statements("then")
            self.take("then")
            node.parts.append((condition, self.statements("elif", "else", "fi")))
            self.present(node.line)
        if self.tokens[self.at].text == "else":
            self.at += 1
            node.otherwise = self.statements("fi")
        self.take("fi")
        return node

    def cases(self) -> Node:
        node = Node("case", self.tokens[self.at].line, [self.tokens[self.at + 1].text])
        self.at += 2
        self.lines()
        self.take("in")
        self.lines()
        while not self.follows("esac"):
            patterns = []
            while (text := self.present(node.line).text) != ")":
                patterns += [] if text in ("|", "(") else [text]
                self.at += 1
            self.at += 1
            node.parts.append((patterns, self.statements(";;", ";;&", ";&", "esac")))
            self.at += self.present(node.line).text != "esac"
            self.lines()
        self.take("esac")
        return node

    def loop(self) -> Node:
        token = self.tokens[self.at]
        self.at += 1
        condition = self.statements("do")
        return Node(token.text, token.line, parts=[(condition, self.done())])

    def each(self) -> Node:
        token, name = self.tokens[self.at], self.tokens[self.at + 1].text
        self.at += 2
        words = [name]
        while self.present(token.line).text != "do":
            one = self.tokens[self.at]
            words += [] if one.operator or one.text == "in" else [one.text]
            self.at += 1
        return Node("for", token.line, words, [([], self.done())])

    def done(self) -> list[Node]:
        self.take("do")
        body = self.statements("done")
        self.take("done")
        return body

    def lines(self) -> None:
        while self.at < len(self.tokens) and self.tokens[self.at].text in ("\n", ";"):
            self.at += 1

    def present(self, line: int) -> Token:
        """Return the token that is next. Raise ConfigError at the end of the script."""
        if self.at >= len(self.tokens):
            raise ConfigError(f"{self.path}, line {line}: what begins here has no end; is the script complete?")
        return self.tokens[self.at]

    def take(self, text: str) -> None:
        self.lines()
        token = self.present(self.tokens[-1].line)
        if token.text != text:
            self.fail(token)
        self.at += 1

    def fail(self, token: Token) -> None:
        shown = "the end of the line" if token.text == "\n" else token.text
        raise ConfigError(
            f"{self.path}, line {token.line}: {shown} is not understood here; save the training command alone in a file"
        )


def parse(text: str, path: str) -> list[Node]:
    """Return the statements of a script. Raise ConfigError with file and line for what is no valid script."""
    parser = Parser(tokens(text), path)
    found = parser.statements()
    return found
