"""Models that all ranks hold. The first rank asks them, the others answer along until it ends."""

from __future__ import annotations

import contextlib
import signal
from collections.abc import Callable, Iterator, Sequence
from datetime import timedelta
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
from megatron.core import parallel_state

from megatron_ft import device
from megatron_ft.chat.conversation import Message, fitted
from megatron_ft.chat.settings import Reply, Settings
from megatron_ft.engine.parallel import Layout
from megatron_ft.generation.answer import Answer
from megatron_ft.generation.loading import ChatModel


class Models:
    """names: of the models, as they are shown."""

    def __init__(self, models: Sequence[ChatModel], names: Sequence[str], layout: Layout):
        self.names, self._models, self._layout = list(names), models, layout
        self._waiting: Any = None
        self._answering = False
        if layout.world_size > 1:  # the user may think for as long as they want
            self._waiting = dist.new_group(backend=device.HOST_BACKEND, timeout=timedelta(days=365))

    @property
    def described(self) -> list[str]:
        """Return a line about each model."""
        formats = [model.chat_format.name if model.chat_format else "plain text" for model in self._models]
        return [f"{name}, {chat_format}" for name, chat_format in zip(self.names, formats, strict=True)]

    def ask(
        self, number: int, messages: list[Message], settings: Settings,
        show: Callable[[str], object], is_halted: Callable[[], bool] = lambda: False,
    ) -> Reply:  # fmt: skip
        """Have one model answer a conversation, on the first rank. show: is given the text as it grows. is_halted: True ends the answer.

        Raise DataError for messages that the chat format cannot write, ConfigError for a message longer than the model's positions.
        """
        model = self._models[number]
        positions = model.decoder.max_positions
        ids, dropped = fitted(messages, model.prompt_ids, positions, settings.max_new_tokens)
        self._answering = True
        self._share((number, ids, settings))
        answer = self._answer(number, ids, settings, show, is_halted)
        self._answering = False
        return Reply(answer, dropped)

    @contextlib.contextmanager
    def shared(self) -> Iterator[bool]:
        """Yield True on the first rank, which asks in this block, and False on the others after they have answered all questions."""
        if not self._layout.is_main:
            self._follow()
            yield False
            return
        try:
            yield True
        finally:
            if not self._answering:  # else the others are no longer in step
                self._share(None)

    def _follow(self) -> None:
        signal.signal(signal.SIGINT, signal.SIG_IGN)  # the first rank says when an answer, or the chat, ends
        while (question := self._share(None)) is not None:
            if self._layout.dp_rank == 0:  # replicas have nothing to do
                number, ids, settings = question
                self._answer(number, ids, settings, lambda _: None, lambda: False)

    def _share(self, question: Any) -> Any:
        """Return the first rank's question on every rank."""
        if self._waiting is None:
            return question
        box = [question]
        dist.broadcast_object_list(box, src=0, group=self._waiting)
        return box[0]

    def _answer(
        self, number: int, ids: np.ndarray, settings: Settings, show: Callable[[str], object], is_halted: Callable[[], bool]
    ) -> Answer:  # fmt: skip
        return self._models[number].stream(
            ids, settings.max_new_tokens, settings.sampling, settings.seed, settings.stop, show,
            lambda: self._agreed(is_halted),
        )  # fmt: skip

    def _agreed(self, is_halted: Callable[[], bool]) -> bool:
        """Return what the first rank says, on all ranks of its model."""
        if self._layout.world_size == self._layout.dp_size:
            return is_halted()
        flag = torch.tensor([is_halted()], device=device.current_device(), dtype=torch.uint8)
        dist.broadcast(flag, src=0, group=parallel_state.get_model_parallel_group())
        return bool(flag)
