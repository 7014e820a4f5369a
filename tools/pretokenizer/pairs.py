"""Records that are a question and its answer, under whatever names: alpaca, prompt and completion, question and response, and the like.

Besides both, a record may have a system message, the history of the chat, a context, tools and the answer's reasoning. Question and
answer may be lists of messages, as TRL has them.
"""

from collections import Counter
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from megatron_ft.errors import DataError, kind_of
from tools.pretokenizer import messages, toolcalls
from tools.pretokenizer.fields import Conversation, get, get_list, get_text, given, keep, pair

Convert = Callable[[dict[str, Any], str, Any, Counter[str]], list[Conversation]]
APART = "\n\n"  # between the parts of a question


@dataclass(frozen=True)
class Pair:
    """The keys of a shape. question: joined with empty lines; only the first is required. lead: stands before it, if it is there."""

    question: tuple[str, ...]
    answer: str
    lead: str | None = None
    system: str | None = None
    history: str = "history"
    context: str = "context"
    tools: str = "tools"

    @property
    def names(self) -> dict[str, str]:
        return {"tools": self.tools, **({"system": self.system} if self.system else {})}

    @property
    def optional(self) -> tuple[str, ...]:
        """The keys that a record may have besides the required ones."""
        system = (self.system,) if self.system else messages.SYSTEM
        lead = (self.lead,) if self.lead else ()
        more = (*lead, *self.question[1:], self.history, self.context, self.tools, "functions", "reasoning_content")
        return (*system, *more)


def reader(shape: Pair) -> Convert:
    """Return the reader of a shape."""

    first, *others = shape.question
    special = frozenset(shape.optional) - frozenset(others)

    def convert(record: dict[str, Any], where: str, options: Any, left_out: Counter[str]) -> list[Conversation]:
        if special.isdisjoint(record):  # the common case, which must be fast
            question, reply = record.get(first), record.get(shape.answer)
            if isinstance(question, str) and isinstance(reply, str) and not any(map(record.get, others)):
                return pair(question, reply, left_out)
        return keep(turns(record, shape, where), left_out)

    return convert


def turns(record: dict[str, Any], shape: Pair, where: str) -> Conversation:
    """Return the turns of a record: system, history, context, question, answer."""
    asked = _asked(record, shape, where)
    answered = _side(record, shape.answer, "assistant", where)
    if given(record, "reasoning_content"):
        answered[-1] = {**answered[-1], "reasoning_content": get_text(record, "reasoning_content", where)}
    context = messages.context_turns(record, where, shape.context)
    whole = [*_history(record, shape.history, where), *context, *asked, *answered]
    whole = messages.with_system(whole, record, where, shape.names)
    return toolcalls.with_tools(whole, record, where, shape.names)


def self_instruct(record: dict[str, Any], where: str, options: Any, left_out: Counter[str]) -> list[Conversation]:
    """Read {"instruction", "instances": [{"input", "output"}]}: a chat for each instance."""
    chats: list[Conversation] = []
    for number, instance in enumerate(get_list(record, "instances", where), 1):
        if not isinstance(instance, dict):
            raise DataError(f"{where}: instance {number} is {kind_of(instance)}, not an object with input and output")
        one = {key: value for key, value in record.items() if key != "instances"} | instance
        chats += keep(turns(one, ALPACA, where), left_out)
    if not chats:
        left_out["chat without messages"] += 1
    return chats


def _asked(record: dict[str, Any], shape: Pair, where: str) -> Conversation:
    first, *others = shape.question
    parts = [get_text(record, key, where) for key in others if given(record, key)]
    lead = [get_text(record, shape.lead, where)] if shape.lead and given(record, shape.lead) else []
    if isinstance(record.get(first), list):
        if parts or lead:
            raise DataError(f"{where}: '{first}' is a list of messages, and there is a second part; keep one of them")
        return [_untrained(turn) for turn in _side(record, first, "user", where)]
    return [{"role": "user", "content": APART.join([*lead, get_text(record, first, where), *parts])}]


def _untrained(turn: dict[str, Any]) -> dict[str, Any]:
    """Return a turn of the prompt: as in TRL, only the completion is trained on, unless the file says otherwise."""
    return {"weight": 0.0, **turn} if turn["role"] == "assistant" else turn


def _side(record: dict[str, Any], key: str, role: str, where: str) -> Conversation:
    """Return one side of a pair: a text of this role, or messages."""
    value = get(record, key, where)
    if value == []:
        raise DataError(f"{where}: '{key}' is a list without messages; give a text, or messages")
    if isinstance(value, list):
        return [turn for message in value for turn in messages.message_turns(message, where)]
    return [{"role": role, "content": get_text(record, key, where)}]


def _history(record: dict[str, Any], key: str, where: str) -> Conversation:
    """Return the turns before a record's question: pairs of question and answer, or messages."""
    result: Conversation = []
    if not given(record, key):
        return result
    for past in get_list(record, key, where):
        if isinstance(past, dict):
            result += messages.message_turns(past, where)
        elif isinstance(past, list) and len(past) == 2 and all(isinstance(text, str) for text in past):
            result += [{"role": "user", "content": past[0]}, {"role": "assistant", "content": past[1]}]
        else:
            raise DataError(
                f"{where}: '{key}' has {kind_of(past)} that is not a question with its answer; give two texts"
            )
    return result


ALPACA = Pair(("instruction", "input"), "output")
SHAPES: Mapping[str, Pair] = {
    "alpaca": ALPACA,
    "gpteacher": Pair(("instruction", "input"), "response"),
    "prompt_completion": Pair(("prompt",), "completion"),
    "critiques": Pair(("prompt",), "response"),
    "question_answer": Pair(("question",), "answer"),
    "question_response": Pair(("question",), "response"),
    "query_response": Pair(("query",), "response"),
    "sled": Pair(("input",), "output", lead="input_prefix"),
}
"""The known shapes by their names in configurations, in the order of recognition."""
