"""megatron-ft chat DIR: talk to a checkpoint or an exported model at the terminal."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING

from megatron_ft.commands.generate import check_sampling
from megatron_ft.config.cli import Command, run_script
from megatron_ft.errors import ConfigError

if TYPE_CHECKING:
    from megatron_ft.generation.loading import Speaker


@dataclass
class Chat:
    """Whom to talk to, and how"""

    load: str = field(default="", metadata={"required": True})
    """checkpoint or exported Hugging Face model"""
    system: str | None = None
    """a system message to begin with"""
    chat_format: str | None = None
    """chat format to speak; default: what the folder says"""
    verify_checkpoint: bool = True
    """compare the folder's files with its digests, where it has them; --no_verify_checkpoint skips this"""
    max_new_tokens: int = 256
    """longest answer, in tokens"""
    temperature: float = 0.0
    """0: always the likeliest token (greedy)"""
    top_k: int = 0
    """choose among the k likeliest only; 0: among all"""
    top_p: float = 1.0
    """choose among the likeliest that together have this probability"""
    bf16: bool = False
    """compute in bfloat16"""


COMMAND = Command(
    name="chat",
    summary="talk to a checkpoint or an exported model",
    sections=(Chat,),
    examples=("megatron-ft chat runs/demo/hf", "megatron-ft chat runs/tuned --temperature 0.8 --top_p 0.9"),
    positional=("load",),
)


def run(chat: Chat) -> int:
    """One conversation until the input ends. /new starts over, /quit ends. Raises UserError as `generate` does."""
    from megatron_ft.checkpoints.folder import check_folder
    from megatron_ft.engine.parallel import process_groups

    check_sampling(chat)
    check_folder(Path(chat.load))
    with process_groups() as layout:
        from megatron_ft.generation.loading import open_speaker

        speaker = open_speaker(Path(chat.load), layout, chat.chat_format, chat.bf16, chat.verify_checkpoint)
        print(
            f"{chat.load}, {speaker.chat_format.name if speaker.chat_format else 'plain text'}. /new starts over, /quit ends."
        )
        _converse(chat, speaker)
    return 0


def _converse(chat: Chat, speaker: Speaker) -> None:
    from megatron_ft.generation.sampling import Sampling

    sampling = Sampling(chat.temperature, chat.top_k, chat.top_p)
    opening = [{"role": "system", "content": chat.system}] if chat.system else []
    messages = list(opening)
    for turn, text in enumerate(_lines()):
        if text == "/quit":
            return
        if text == "/new":
            messages = list(opening)
            continue
        messages.append({"role": "user", "content": text})
        try:
            answer = speaker.answers([messages], chat.max_new_tokens, sampling, seed=turn)[0]
        except ConfigError:  # longer than the model's positions
            print("this no longer fits the model's context: ask something shorter, or start over with /new")
            messages.pop()
            continue
        print(answer)
        messages.append({"role": "assistant", "content": answer})


def _lines() -> Iterator[str]:
    """What the user types, line by line, until the input ends."""
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
