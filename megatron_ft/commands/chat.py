"""megatron-ft chat DIR: chat with a checkpoint or an exported model in the terminal."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from dataclasses import dataclass, field
from datetime import timedelta
from pathlib import Path
from typing import TYPE_CHECKING

from megatron_ft.commands.generate import check_sampling
from megatron_ft.commands.in_layout import LAYOUT_FLAGS, Asked, GenerationLayout, in_layout
from megatron_ft.config.cli import Command, run_script
from megatron_ft.config.sections import Processes
from megatron_ft.errors import ConfigError

if TYPE_CHECKING:
    from megatron_ft.engine.parallel import Layout
    from megatron_ft.generation.loading import ChatModel


@dataclass
class Chat:
    """Model and sampling"""

    load: str = field(default="", metadata={"required": True})
    """folder of a checkpoint or of an exported Hugging Face model"""
    adapter: str | None = None
    """adapters of the model in --load: a checkpoint of a run with --lora_rank, which may also be given as --load, or a PEFT folder"""
    system: str | None = None
    """system message at the start of the conversation; default: none"""
    chat_format: str | None = None
    """chat format of the prompts; default: the one recorded in the folder"""
    template_arguments: list[str] = field(default_factory=list)
    """variables for the tokenizer's own chat template, such as enable_thinking=false; values are read as JSON, else as text"""
    verify_checkpoint: bool = True
    """compare the folder's files with their recorded digests, if there are any; --no_verify_checkpoint skips this"""
    max_new_tokens: int = 256
    """largest number of tokens per answer"""
    temperature: float = 0.0
    """sampling temperature; 0: always the most likely token (greedy)"""
    top_k: int = 0
    """sample only from this many most likely tokens; 0: from all"""
    top_p: float = 1.0
    """sample only from the most likely tokens whose probabilities add up to this; 1: from all"""
    repetition_penalty: float = 1.0
    """divide the logits of tokens that the conversation contains by this, as transformers does; 1: no penalty"""
    stop: list[str] = field(default_factory=list)
    """strings that an answer ends before, besides the stop token of the chat format"""
    bf16: bool | None = None
    """compute in bfloat16, --no_bf16: in fp32; default: bfloat16 for an exported model in bfloat16, else fp32"""


COMMAND = Command(
    name="chat",
    summary="chat with a checkpoint or an exported model in the terminal",
    sections=(Chat, GenerationLayout, Processes),
    examples=("megatron-ft chat runs/demo/hf", "megatron-ft chat runs/tuned --temperature 0.8 --top_p 0.9"),
    positional=("load",),
    common=(
        "load: folder of a checkpoint or of an export",
        "adapter",
        "system",
        "chat_format",
        "max_new_tokens",
        "temperature",
        "top_k",
        "top_p",
        "repetition_penalty",
        "stop",
        "bf16",
        *LAYOUT_FLAGS,
    ),
)


def run(chat: Chat, parallel: GenerationLayout, processes: Processes) -> int:
    """Answer line by line until the input ends; /new starts a new conversation, /quit ends. Raise UserError as `generate` does."""
    from megatron_ft.checkpoints.folder import check_folder

    check_sampling(chat)
    for given in filter(None, (chat.load, chat.adapter)):
        check_folder(Path(given))

    def work(layout: Layout) -> None:
        from megatron_ft.generation.loading import open_chat_model

        model = open_chat_model(
            Path(chat.load), layout, chat.chat_format, chat.bf16, chat.verify_checkpoint, chat.template_arguments,
            Path(chat.adapter) if chat.adapter else None,
        )  # fmt: skip
        chat_format = model.chat_format.name if model.chat_format else "plain text"
        _say(layout, f"{chat.load}, {chat_format}. /new starts a new conversation, /quit ends.")
        _converse(chat, model, layout)

    asked = Asked(chat.load, chat.adapter, chat.bf16)
    return in_layout(work, [asked], parallel, processes, reads_input=True)


def _converse(chat: Chat, model: ChatModel, layout: Layout) -> None:
    from megatron_ft.generation.sampling import Sampling

    sampling = Sampling(chat.temperature, chat.top_k, chat.top_p, chat.repetition_penalty)
    opening = [{"role": "system", "content": chat.system}] if chat.system else []
    messages = list(opening)
    for turn, text in enumerate(_shared(_lines() if layout.is_main else iter(()), layout)):
        if text == "/quit":
            return
        if text == "/new":
            messages = list(opening)
            continue
        messages.append({"role": "user", "content": text})
        try:
            answer = model.answers([messages], chat.max_new_tokens, sampling, seed=turn, stop=chat.stop)[0]
        except ConfigError:  # longer than the model's positions
            _say(
                layout,
                "the conversation is longer than the model's context: ask a shorter question, or start a new one with /new",
            )
            messages.pop()
            continue
        _say(layout, answer)
        messages.append({"role": "assistant", "content": answer})


def _say(layout: Layout, text: str) -> None:
    if layout.is_main:
        print(text, flush=True)


def _shared(lines: Iterator[str], layout: Layout) -> Iterator[str]:
    """Yield the first rank's lines on every rank. The others wait for the user as long as it takes, without using their cores."""
    if layout.world_size == 1:
        yield from lines
        return
    import torch.distributed as dist

    from megatron_ft import device

    waiting = dist.new_group(backend=device.HOST_BACKEND, timeout=timedelta(days=365))
    while True:
        box = [next(lines, None)]
        dist.broadcast_object_list(box, src=0, group=waiting)
        if box[0] is None:
            return
        yield box[0]


def _lines() -> Iterator[str]:
    """Yield the lines that the user types, without empty ones, until the input ends."""
    while True:
        try:
            text = input("> ").strip()
        except EOFError:
            print()
            return
        if text:
            yield text


if __name__ == "__main__":
    sys.exit(run_script(COMMAND, run))
