"""The environment in which chat templates (Jinja) run: the filters, functions and tags that transformers gives them.

Beside transformers' output it can say where each character of it comes from (traced.py): templates are compiled such that loops over
messages tell whose turn is being written. Knows no tokenizer.
"""

import contextlib
import json
from collections.abc import Callable, Iterable, Iterator, Mapping
from functools import cache
from typing import Any

import jinja2
import jinja2.ext
import jinja2.parser
from jinja2 import TemplateError, nodes
from jinja2.compiler import CodeGenerator, Frame
from jinja2.sandbox import ImmutableSandboxedEnvironment, SecurityError
from jinja2.visitor import NodeTransformer

from megatron_ft.data.tool_text import REASONING_KEYS
from megatron_ft.data.traced import (
    CALL,
    DEFINED,
    OWN,
    PLAIN,
    REASON,
    Label,
    Traced,
    joined,
    label_of,
    labelled,
    runs_of,
    switch,
    written,
)
from megatron_ft.data.traced import traced as with_runs
from megatron_ft.errors import TokenizerError

FAULTS = (jinja2.TemplateError, TypeError, ValueError, KeyError, IndexError, AttributeError, ZeroDivisionError)
_TURN = "turn_of_message"
_HELD = "\ue0fd"  # a character for private use, around the number of a text
Clock = Callable[[str], str]


def compile_template(source: str, clock: Clock) -> Any:
    """Compile a template as transformers does: in a sandbox, lines with only tags are removed. clock: strftime_now."""
    environment = _environment(clock)
    with _readable():
        return environment.from_string(source)


def compile_traced(source: str, clock: Clock) -> Any:
    """Compile a template such that its text has labels."""
    environment = _environment(clock)
    environment.concat = written
    environment.code_generator_class = _Generator
    environment.globals[_TURN] = _turn
    environment.globals["joined_texts"] = lambda *parts: joined(map(str, parts))
    environment.filters["join"] = _join
    with _readable():
        tree = _Turns().visit(environment.parse(source))
        return environment.template_class.from_code(
            environment, environment.compile(tree), environment.make_globals(None)
        )


@contextlib.contextmanager
def _readable() -> Iterator[None]:
    """Raise TokenizerError for a template that cannot be compiled."""
    try:
        yield
    except (TemplateError, SyntaxError) as error:  # the latter of Python, for a continue within a block of its own
        raise TokenizerError(
            f"the tokenizer's chat template cannot be read ({error}); choose another --chat_format"
        ) from error


def as_passed(messages: Iterable[Mapping[str, Any]]) -> list[dict[str, Any]]:
    """Return the messages as transformers passes them to a template: without nulls, reasoning also under its standard name."""
    result = []
    for message in messages:
        passed = {key: value for key, value in message.items() if value is not None}
        reasoning = next((passed[key] for key in REASONING_KEYS if key in passed), None)
        if reasoning is not None:
            passed = {"thinking": reasoning, **passed, "reasoning_content": reasoning}
        result.append(passed)
    return result


def marked(messages: Iterable[Mapping[str, Any]]) -> list[dict[str, Any]]:
    """Return the messages with labels on their texts."""
    return [Marked.of(message, number) for number, message in enumerate(messages)]


def marked_definitions(value: Any) -> Any:
    """Return tools or documents with labels on their texts."""
    return _mark(value, Label(None, DEFINED))


class Marked(dict[str, Any]):
    """A message, or a part of one, with its label."""

    _label: Label

    @classmethod
    def of(cls, message: Mapping[str, Any], number: int) -> "Marked":
        result = cls(message)
        result._label = Label(number)
        for key, kind in (("content", PLAIN), ("tool_calls", CALL), *((key, REASON) for key in REASONING_KEYS)):
            if key in result:
                result[key] = _mark(result[key], Label(number, kind))
        return result


def _mark(value: Any, label: Label) -> Any:
    if isinstance(value, str):
        return labelled(value, label)
    if isinstance(value, list):
        return [_mark(item, label) for item in value]
    if isinstance(value, dict):
        result = Marked({key: _mark(item, label) for key, item in value.items()})
        result._label = label
        return result
    return value


def _turn(value: Any, depth: int) -> str:
    """Return the switch that a loop writes first in each round."""
    label = value._label if isinstance(value, Marked) else label_of(value)
    return switch(depth, label.message if label else None, label.kind if label else PLAIN)


class _Turns(NodeTransformer):
    """Adds to each loop what tells whose turn it writes."""

    depth = 0

    def visit_For(self, node: nodes.For) -> list[nodes.Node]:
        self.depth += 1
        node = self.generic_visit(node)  # type: ignore[assignment]
        if isinstance(node.target, nodes.Name):
            node.body.insert(0, self._call(nodes.Name(node.target.name, "load"), node.lineno))
        end = self._call(nodes.Const(None), node.lineno)
        self.depth -= 1
        return [node, end]

    def visit_Assign(self, node: nodes.Assign) -> Any:
        """Add a switch after an assignment that takes a message by its index."""
        self.generic_visit(node)
        picked = isinstance(node.node, nodes.Getitem) and not isinstance(node.node.arg, nodes.Slice | nodes.Const)
        if not self.depth or not picked or not isinstance(node.target, nodes.Name):
            return node
        return [node, self._call(nodes.Name(node.target.name, "load"), node.lineno)]

    def _call(self, value: nodes.Expr, line: int) -> nodes.Output:
        call = nodes.Call(nodes.Name(_TURN, "load"), [value, nodes.Const(self.depth)], [], None, None)
        output = nodes.Output([call])
        return output.set_lineno(line)  # type: ignore[return-value]


class _Generator(CodeGenerator):
    """Writes `a ~ b` such that labels stay."""

    def visit_Concat(self, node: nodes.Concat, frame: Frame) -> None:
        self.write("environment.globals['joined_texts'](")
        for part in node.nodes:
            self.visit(part, frame)
            self.write(", ")
        self.write(")")


class _Sandbox(ImmutableSandboxedEnvironment):
    def call(__self, __context: Any, __obj: Any, *args: Any, **kwargs: Any) -> Any:
        owner = getattr(__obj, "__self__", None)
        plain = not kwargs.keys() - {"_loop_vars", "_block_vars"}  # which compiled loops pass
        if type(owner) is str and getattr(__obj, "__name__", "") == "join" and len(args) == 1 and plain:
            parts = list(args[0])
            if any(isinstance(part, Traced) for part in parts):
                return joined(parts, owner)
        return super().call(__context, __obj, *args, **kwargs)


class Generation(jinja2.ext.Extension):
    """The tag {% generation %}."""

    tags = {"generation"}  # noqa: RUF012 - as jinja2 has it

    def parse(self, parser: jinja2.parser.Parser) -> nodes.Node:
        line = next(parser.stream).lineno
        body = parser.parse_statements(("name:endgeneration",), drop_needle=True)
        return nodes.CallBlock(self.call_method("_said"), [], [], body).set_lineno(line)

    def _said(self, caller: Callable[[], str]) -> str:
        text = caller()
        if self.environment.concat is not written:
            return text
        return with_runs(text, [(length, label._replace(trained=True)) for length, label in runs_of(text)])


@cache
def _namespace() -> Any:
    class Namespace(jinja2.utils.Namespace):
        """Refuses names with an underscore before them, as transformers does."""

        def __init__(*args: Any, **kwargs: Any) -> None:
            self, args = args[0], args[1:]
            attributes = dict(*args, **kwargs)
            for name in attributes:
                Namespace._check(name)
            jinja2.utils.Namespace.__init__(self, attributes)

        def __setitem__(self, name: str, value: Any) -> None:
            Namespace._check(name)
            jinja2.utils.Namespace.__setitem__(self, name, value)

        @staticmethod
        def _check(name: Any) -> None:
            if isinstance(name, str) and name.startswith("_"):
                raise SecurityError(f"a chat template cannot store {name!r} on a namespace")

    return Namespace


class _Dict:
    def __call__(self, *args: Any, **kwargs: Any) -> dict[Any, Any]:
        return dict(*args, **kwargs)

    def fromkeys(self, *args: Any, **kwargs: Any) -> dict[Any, Any]:
        return dict.fromkeys(*args, **kwargs)


def _environment(clock: Clock) -> Any:
    environment = _Sandbox(trim_blocks=True, lstrip_blocks=True, extensions=[Generation, jinja2.ext.loopcontrols])
    environment.filters["tojson"] = _tojson
    environment.globals |= {
        "raise_exception": _raise, "strftime_now": clock, "dict": _Dict(), "namespace": _namespace()
    }  # fmt: skip
    return environment


def _raise(message: str) -> None:
    raise TemplateError(message)


def _tojson(
    x: Any, ensure_ascii: bool = False, indent: Any = None, separators: Any = None, sort_keys: bool = False
) -> str:
    how = {"ensure_ascii": ensure_ascii, "indent": indent, "separators": separators, "sort_keys": sort_keys}
    text, label = json.dumps(x, **how), _label_of(x)
    if label not in (None, OWN):
        return labelled(text, label)
    return text if isinstance(x, str) else _json_of_texts(x, how)


def _label_of(x: Any) -> Any:
    """Return the label of a value, or the one of all items of a list; None if there is none."""
    if isinstance(x, list) and x and all(isinstance(item, Marked) for item in x):
        labels = {item._label for item in x}
        return labels.pop() if len(labels) == 1 else None
    return x._label if isinstance(x, Marked) else label_of(x)


def _json_of_texts(x: Any, how: dict[str, Any]) -> str:
    """Return JSON of an object that a template has made: its texts keep their labels."""
    texts: list[Traced] = []

    def held(value: Any) -> Any:
        if isinstance(value, Traced):
            texts.append(value)
            return f"{_HELD}{len(texts) - 1}{_HELD}"
        if isinstance(value, dict):
            return {key: held(item) for key, item in value.items()}
        return [held(item) for item in value] if isinstance(value, list | tuple) else value

    sign = json.dumps(_HELD, ensure_ascii=how["ensure_ascii"])[1:-1]
    parts = json.dumps(held(x), **how).split(sign)
    for i, number in enumerate(parts[1::2]):
        one = texts[int(number)] if number.isdecimal() and int(number) < len(texts) else ""
        parts[2 * i + 1] = labelled(json.dumps(one, ensure_ascii=how["ensure_ascii"])[1:-1], _label_of(one) or OWN)
    return joined(parts)


@jinja2.pass_eval_context
def _join(context: Any, value: Any, d: str = "", attribute: Any = None) -> str:
    """Join texts as the filter of that name does, and keep their labels."""
    if context.autoescape or attribute is not None:
        return jinja2.filters.do_join(context, value, d, attribute)
    return joined(list(map(str, value)), str(d))
