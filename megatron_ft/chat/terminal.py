"""The chat in a terminal: questions, answers and commands that begin with a slash."""

from __future__ import annotations

import contextlib
import signal
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

from megatron_ft.chat.conversation import Conversation
from megatron_ft.chat.screen import Screen
from megatron_ft.errors import UserError
from megatron_ft.files import atomic_file

if TYPE_CHECKING:
    from megatron_ft.chat.models import Models
    from megatron_ft.chat.settings import Reply, Settings


class Command(NamedTuple):
    """argument: as /help shows it. run: is given the text behind the name; returns False to leave the chat."""

    argument: str
    help: str
    run: Callable[[Talk, str], bool | None]


@dataclass
class Talk:
    """One chat. interruptible: Ctrl-C ends an answer instead of the program."""

    models: Models
    conversation: Conversation
    settings: Settings
    screen: Screen
    interruptible: bool = False
    saved: set[Path] = field(default_factory=set)
    dropped: int = 0

    def run(self, texts: Iterable[str]) -> None:
        """Answer until the texts end, or one of them is /quit."""
        for text in texts:
            if text.startswith("//"):
                self.ask(text[1:])
            elif not text.startswith("/") or "\n" in text:
                self.ask(text)
            elif self.command(text) is False:
                return

    def command(self, text: str) -> bool | None:
        """Run a command of one line."""
        name, _, argument = text.partition(" ")
        name = ALSO.get(name, name)
        if name not in COMMANDS:
            self.screen.note(
                f"unknown command {name}: /help lists them; // at the start sends a text that begins with /"
            )
            return None
        return COMMANDS[name].run(self, argument.strip())

    def ask(self, text: str) -> None:
        """Send a question to all models and show their answers."""
        self.conversation.ask(text)
        try:
            with _interrupts(self.interruptible) as pressed:
                for model in range(len(self.models.names)):
                    pressed.clear()
                    self._answer(model, lambda: bool(pressed))
        except UserError as error:
            self.screen.note(str(error))
            self.conversation.take_back()

    def _answer(self, model: int, is_halted: Callable[[], bool]) -> None:
        messages = self.conversation.messages(model)
        self.screen.begin(model)
        reply = self.models.ask(model, messages, self.settings, self.screen.show, is_halted)
        self.screen.end()
        self.conversation.answer(model, reply.answer.text)
        self._remark(reply)

    def _remark(self, reply: Reply) -> None:
        """Say what is not in the answer's text."""
        tokens = reply.answer.tokens
        if reply.answer.halted:
            self.screen.note("(stopped)")
        elif not reply.answer.text:
            self.screen.note("(no text: the model ended its answer at once)")
        elif reply.answer.full:
            self.screen.note(f"(the answer ends at {tokens} tokens: /set max_new_tokens {2 * tokens}, then /retry)")
        if reply.dropped > self.dropped:
            self.screen.note(
                f"(longer than the model's context: the first {reply.dropped} messages were not read; /new begins a new conversation)"
            )
        self.dropped = reply.dropped


@contextlib.contextmanager
def _interrupts(noted: bool) -> Iterator[list[int]]:
    """Yield a list to which each Ctrl-C in this block is added; if it is not noted, Ctrl-C acts as ever."""
    pressed: list[int] = []
    if not noted:
        yield pressed
        return
    before = signal.signal(signal.SIGINT, lambda number, _: pressed.append(number))
    try:
        yield pressed
    finally:
        signal.signal(signal.SIGINT, before)


def _help(talk: Talk, _: str) -> None:
    width = max(len(f"{name} {command.argument}") for name, command in COMMANDS.items()) + 2
    lines = [f"{f'{name} {command.argument}':{width}}{command.help}" for name, command in COMMANDS.items()]
    more = (
        'A line that ends with \\ goes on in the next one; """ begins and ends a message of several lines.',
        "Ctrl-C stops an answer, Ctrl-D leaves.",
    )
    talk.screen.note("\n".join([*lines, *more]))


def _system(talk: Talk, text: str) -> None:
    if text:
        talk.conversation.system = None if text == "none" else text
    said = talk.conversation.system
    talk.screen.note(f"system message: {said}" if said else "no system message; /system TEXT sets one")


def _retry(talk: Talk, _: str) -> None:
    question = talk.conversation.take_back()
    if question is None:
        talk.screen.note("nothing was asked yet")
        return
    if talk.settings.sampling.temperature == 0:
        talk.screen.note("(greedy answers are the same each time: /set temperature 0.8 changes that)")
    talk.settings = replace(talk.settings, seed=talk.settings.seed + 1)
    talk.ask(question)


def _undo(talk: Talk, _: str) -> None:
    question = talk.conversation.take_back()
    talk.screen.note("nothing was asked yet" if question is None else f"forgotten: {_short(question)}")


def _short(text: str) -> str:
    line = " ".join(text.split())
    return line if len(line) <= 60 else f"{line[:57]}..."


def _new(talk: Talk, _: str) -> None:
    talk.conversation.clear()
    talk.dropped = 0
    talk.screen.note("a new conversation")


def _set(talk: Talk, text: str) -> None:
    """Show or change a value of the sampling."""
    from megatron_ft.chat.values import changed, described

    if text:
        try:
            talk.settings = changed(talk.settings, *text.split())
        except UserError as error:
            talk.screen.note(str(error))
            return
    talk.screen.note(described(talk.settings))


def _save(talk: Talk, text: str) -> None:
    """Write the conversation. A file that this chat has not written stays."""
    path = Path(text).expanduser()
    if not text or not talk.conversation.turns[0]:
        talk.screen.note("nothing to save yet" if text else "give a name: /save chat.jsonl")
    elif path.exists() and path.resolve() not in talk.saved:
        talk.screen.note(f"{path} exists: give another name")
    else:
        _write(talk, path)


def _write(talk: Talk, path: Path) -> None:
    try:
        with atomic_file(path, "w") as file:
            file.write(talk.conversation.saved(talk.models.names))
    except OSError as error:
        talk.screen.note(f"{path}: cannot be written ({(error.strerror or str(error)).lower()}); give another place")
        return
    talk.saved.add(path.resolve())
    talk.screen.note(f"saved in {path}, which megatron-ft pretokenize reads")


COMMANDS = {
    "/help": Command("", "list the commands", _help),
    "/system": Command("TEXT", "set the system message; without TEXT show it, none removes it", _system),
    "/retry": Command("", "answer the last question again", _retry),
    "/undo": Command("", "forget the last question and its answer", _undo),
    "/new": Command("", "begin a new conversation; /clear and /reset do the same", _new),
    "/set": Command("NAME VALUE", "change a value, such as temperature 0.8; alone: show all", _set),
    "/save": Command("FILE", "write the conversation as a line of JSON, which pretokenize reads", _save),
    "/quit": Command("", "leave; so does Ctrl-D", lambda *_: False),
}  # fmt: skip
ALSO = {"/clear": "/new", "/reset": "/new", "/exit": "/quit", "/bye": "/quit", "/?": "/help"}
