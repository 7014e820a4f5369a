"""A model that needs no weights: it repeats the last question word by word, in capital letters."""

import time
from dataclasses import dataclass, field

from megatron_ft.chat.settings import Reply, Settings
from megatron_ft.generation.answer import Answer


@dataclass(frozen=True)
class Sampling:
    """As megatron_ft.generation.sampling has it, without torch."""

    temperature: float = 0.0
    top_k: int = 0
    top_p: float = 1.0
    repetition_penalty: float = 1.0


SETTINGS = Settings(8, Sampling())


@dataclass
class Echo:
    """In place of Models. pause: seconds before each word. endless: a question with this word has no end."""

    names: list[str] = field(default_factory=lambda: ["echo"])
    pause: float = 0.0
    endless: str = "forever"
    asked: list = field(default_factory=list)

    def ask(self, number, messages, settings, show, is_halted=lambda: False):
        self.asked.append((number, messages, settings))
        words, said = messages[-1]["content"].upper().split(), []
        if self.endless.upper() in words:
            words = ["ON"] * 100_000
        for word in words:
            time.sleep(self.pause)
            said.append(word)
            show(word if len(said) == 1 else f" {word}")
            if is_halted() or (len(said) == settings.max_new_tokens and self.endless not in messages[-1]["content"]):
                break
        full = len(said) == settings.max_new_tokens and not is_halted()
        return Reply(Answer(" ".join(said), len(said), full, is_halted()), 2 if len(messages) > 6 else 0)
