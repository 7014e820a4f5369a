"""The chat in a terminal: commands, several lines, Ctrl-C, history. Real terminals are pseudo-terminals."""

import json
import os
import pty
import select
import signal
import stat
import subprocess
import sys
import time
from pathlib import Path

import pytest

from megatron_ft.chat import lines
from megatron_ft.chat.conversation import Conversation
from megatron_ft.chat.screen import Screen
from megatron_ft.chat.terminal import COMMANDS, Talk
from tests.chat.stand_ins import SETTINGS, Echo

ROOT = Path(__file__).parents[2]


@pytest.fixture
def chat(capsys):
    """Type lines as from a pipe: (lines on standard output, notes). Later calls go on with the same chat."""
    talk = Talk(Echo(), Conversation(), SETTINGS, Screen(["echo"], False))

    def type_(*typed):
        rest = iter(typed)
        talk.run(lines.messages(lambda _: next(rest, None)))
        out, err = capsys.readouterr()
        return out.splitlines(), err.splitlines()

    type_.talk = talk
    return type_


def test_answers_alone_are_on_standard_output(chat):
    assert chat("a plum", "", "  ", "two") == (["A PLUM", "TWO"], [])


def test_messages_of_several_lines(chat):
    chat("one \\", "two\\", "three", '"""', "four", "", "  five", '"""', '"""six"""', '"""seven', 'eight"""', "nine\\")
    asked = [messages[-1]["content"] for _, messages, _ in chat.talk.models.asked]
    assert asked == ["one \ntwo\nthree", "four\n\n  five", "six", "seven\neight", "nine"]


def test_the_end_of_the_input_within_a_block(chat):
    assert chat('"""', "plum")[0] == ["PLUM"]


def test_commands(chat):
    assert [line.split()[0] for line in chat("/help")[1][: len(COMMANDS)]] == list(COMMANDS)
    assert chat("/bogus x") == (
        [],
        ["unknown command /bogus: /help lists them; // at the start sends a text that begins with /"],
    )
    assert chat("/undo")[1] == chat("/retry")[1] == ["nothing was asked yet"]
    assert chat("//etc/hosts") == (["/ETC/HOSTS"], [])
    assert chat("/undo")[1] == ["forgotten: /etc/hosts"]
    assert chat("/system Be brief.", "a")[0] == ["A"]
    assert chat.talk.models.asked[-1][1][0] == {"role": "system", "content": "Be brief."}
    assert chat("/system none")[1] == ["no system message; /system TEXT sets one"]
    assert chat("/clear")[1] == chat("/new")[1] == ["a new conversation"]
    assert chat("/quit", "a") == ([], [])


def test_retry_has_another_seed_and_the_same_question(chat):
    out, notes = chat("a", "b", "/set temperature 0.5", "/retry")
    assert out == ["A", "B", "B"] and len(notes) == 1
    (_, before, first), (_, after, second) = chat.talk.models.asked[-2:]
    assert before == after and second.seed == first.seed + 1 and second.sampling.temperature == 0.5


@pytest.mark.parametrize(
    ("typed", "said"),
    [
        ("/set", "temperature 0, top_k 0, top_p 1, repetition_penalty 1, max_new_tokens 8, seed 0"),
        ("/set top_p 0", "top_p 0: give a number above 0, at most 1"),
        ("/set top_k 1.5", "top_k 1.5: give a whole number, 0 for all tokens"),
        ("/set temperature nan", "temperature nan: give a number from 0 (greedy) to 100"),
        ("/set max_new_tokens", "max_new_tokens : give a whole number of at least 1"),
        ("/set heat 1", "/set heat 1: give one of temperature, top_k, top_p, repetition_penalty, max_new_tokens, seed and a value"),
        ("/save", "give a name: /save chat.jsonl"),
        ("/save x", "nothing to save yet"),
    ],
)  # fmt: skip
def test_one_line_for_each_mistake(chat, typed, said):
    assert chat(typed) == ([], [said])


def test_what_was_left_out_or_cut_is_said(chat):
    notes = chat(*"abcde")[1]
    assert notes == [
        "(longer than the model's context: the first 2 messages were not read; /new begins a new conversation)"
    ]
    assert chat("a b c d e f g h i")[1] == ["(the answer ends at 8 tokens: /set max_new_tokens 16, then /retry)"]


def test_saving(chat, tmp_path):
    path = tmp_path / "new" / "chat.jsonl"
    assert chat("a", f"/save {path}")[1] == [f"saved in {path}, which megatron-ft pretokenize reads"]
    chat("b", f"/save {path}")
    (line,) = path.read_text().splitlines()
    assert [message["content"] for message in json.loads(line)["messages"]] == ["a", "A", "b", "B"]
    (tmp_path / "other").write_text("mine")
    assert chat(f"/save {tmp_path / 'other'}")[1] == [f"{tmp_path / 'other'} exists: give another name"]
    assert "cannot be written" in chat("/save /proc/chat.jsonl")[1][0]
    assert (tmp_path / "other").read_text() == "mine"


def test_two_models(capsys):
    models = Echo(["runs/a", "runs/b"])
    Talk(models, Conversation(models=2), SETTINGS, Screen(models.names, False)).run(["plum"])
    assert capsys.readouterr().out == "[runs/a]\nPLUM\n\n[runs/b]\nPLUM\n\n"
    assert [number for number, _, _ in models.asked] == [0, 1]


PROGRAM = """
import os, sys
from megatron_ft.chat import lines
from megatron_ft.chat.conversation import Conversation
from megatron_ft.chat.screen import Screen
from megatron_ft.chat.terminal import COMMANDS, Talk
from tests.chat.stand_ins import SETTINGS, Echo
read = lines.in_terminal(lines.history_file(), list(COMMANDS))
print("ready")
Talk(Echo(pause=0.01), Conversation(), SETTINGS, Screen(["echo"], lines.is_terminal()), interruptible=True).run(lines.messages(read))
print("left")
"""


class Terminal:
    """A program in a pseudo-terminal."""

    def __init__(self, **environment):
        here, there = pty.openpty()
        known = {k: v for k, v in os.environ.items() if k not in ("HOME", "XDG_STATE_HOME", "NO_COLOR")}
        self.process = subprocess.Popen(
            [sys.executable, "-c", PROGRAM], cwd=ROOT, stdin=there, stdout=there, stderr=there, start_new_session=True,
            env={**known, "TERM": "dumb", "INPUTRC": "/dev/null", **environment},
        )  # fmt: skip
        os.close(there)
        self.end, self.seen = here, ""

    def wait(self, text: str) -> None:
        """Read until a text appears after what was waited for before."""
        deadline = time.monotonic() + 60
        while text not in self.seen:
            assert time.monotonic() < deadline, self.seen
            if select.select([self.end], [], [], 1)[0]:
                try:
                    self.seen += os.read(self.end, 4096).decode()
                except OSError:
                    raise AssertionError(f"ended: {self.seen}") from None
        self.seen = self.seen.split(text, 1)[1]

    def type(self, text: str) -> None:
        os.write(self.end, text.encode())

    def interrupt(self) -> None:
        os.killpg(self.process.pid, signal.SIGINT)

    def leave(self) -> int:
        """Press Ctrl-D at the next prompt; before it the terminal is not yet readline's."""
        self.wait("> ")
        self.type("\x04")
        self.wait("left")
        code = self.process.wait(60)
        os.close(self.end)
        return code


def test_ctrl_c_ends_the_answer_and_ctrl_d_the_chat(tmp_path):
    terminal = Terminal(HOME=str(tmp_path))
    terminal.wait("> ")
    terminal.type("forever\n")
    terminal.wait("ON ON")
    terminal.interrupt()
    terminal.wait("(stopped)")
    terminal.wait("> ")
    terminal.type("half a li")
    terminal.wait("half a li")
    terminal.interrupt()  # forgets the line
    terminal.wait("\n")
    terminal.wait("> ")
    terminal.type("plum\n")
    terminal.wait("PLUM")
    assert terminal.leave() == 0


def test_the_history_is_private_and_comes_back(tmp_path):
    terminal = Terminal(HOME=str(tmp_path))
    terminal.wait("> ")
    terminal.type("a first line\n")
    terminal.wait("A FIRST LINE")
    terminal.leave()
    path = tmp_path / ".local/state/megatron_ft/chat_history"
    assert "a first line" in path.read_text() and stat.S_IMODE(path.stat().st_mode) == 0o600
    assert stat.S_IMODE(path.parent.stat().st_mode) == 0o700
    again = Terminal(XDG_STATE_HOME=str(tmp_path / ".local/state"))
    again.wait("> ")
    again.type("\x10\n")  # Ctrl-P: the line before
    again.wait("A FIRST LINE")
    again.leave()


def test_bytes_that_are_no_characters():
    program = PROGRAM.replace("lines.in_terminal(lines.history_file(), list(COMMANDS))", "lines.from_pipe")
    done = subprocess.run(
        [sys.executable, "-c", program], cwd=ROOT, input=b"pl\xffum \xc3\xa9\r\n", capture_output=True
    )
    assert done.stdout.decode().splitlines() == ["ready", "PL\ufffdUM É", "left"] and not done.stderr
    typed = iter(["pl\udcffum"])  # as readline gives such a byte
    assert list(lines.messages(lambda _: next(typed, None))) == ["pl\ufffdum"]


def test_what_is_pasted_is_one_message(tmp_path):
    terminal = Terminal(HOME=str(tmp_path), TERM="xterm")
    terminal.wait("> ")
    terminal.type("\x1b[200~/one\ntwo\x1b[201~\n")  # bracketed paste
    terminal.wait("/ONE TWO")
    assert terminal.leave() == 0


@pytest.mark.parametrize("home", ["/proc/nowhere", "/dev/null"])
def test_a_place_where_nothing_can_be_kept(home):
    terminal = Terminal(HOME=home)
    terminal.wait("> ")
    terminal.type("plum\n")
    terminal.wait("PLUM")
    assert terminal.leave() == 0


def test_a_relative_place_is_none(monkeypatch, tmp_path):
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.setenv("XDG_STATE_HOME", "state")
    assert lines.history_file() == tmp_path / ".local/state/megatron_ft/chat_history"
