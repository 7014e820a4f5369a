"""megatron-ft chat DIR: chat with a checkpoint or an exported model, or with two side by side, in the terminal or in the browser."""

from __future__ import annotations

import sys
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING

from megatron_ft.commands.generate import check_sampling
from megatron_ft.commands.in_layout import LAYOUT_FLAGS, Asked, GenerationLayout, in_layout
from megatron_ft.config.cli import Command, run_script
from megatron_ft.config.sections import Processes
from megatron_ft.errors import ConfigError

if TYPE_CHECKING:
    from megatron_ft.chat.models import Models
    from megatron_ft.chat.settings import Settings
    from megatron_ft.engine.parallel import Layout

DEFAULT_PORT = 7860


@dataclass
class Chat:
    """Models and sampling"""

    load: str = field(default="", metadata={"required": True})
    """folder of a checkpoint or of an exported Hugging Face model"""
    adapter: str | None = None
    """adapters of the model in --load: a checkpoint of a run with --lora_rank, which may also be given as --load, or a PEFT folder"""
    compare: str | None = None
    """folder of a second model, which answers the same questions beside the first"""
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
    seed: int = 0
    """seed of the sampling; each /retry takes the next one"""
    bf16: bool | None = None
    """compute in bfloat16, --no_bf16: in fp32; default: bfloat16 for an exported model in bfloat16, else fp32"""
    history: bool = True
    """keep what is typed, for the arrow keys, in ~/.local/state/megatron_ft/chat_history (or below $XDG_STATE_HOME), which only you can
    read; --no_history keeps nothing"""
    web: bool = False
    """chat on a page in the browser instead, which only this machine can reach"""
    port: int | None = None
    """port of the page of --web, 0: a free one; default: 7860"""


COMMAND = Command(
    name="chat",
    summary="chat with a checkpoint or an exported model, or two, in the terminal or the browser",
    sections=(Chat, GenerationLayout, Processes),
    examples=(
        "megatron-ft chat runs/demo/hf",
        "megatron-ft chat runs/tuned --temperature 0.8 --top_p 0.9",
        "megatron-ft chat runs/tuned --compare runs/base",
        "megatron-ft chat runs/tuned --web",
    ),
    positional=("load",),
    common=(
        "load: folder of a checkpoint or of an export",
        "adapter",
        "compare",
        "web",
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
    """Answer until the input ends, or the page's server is stopped. Raise UserError as `generate` does, and for a port in use."""
    from megatron_ft.checkpoints.folder import check_folder

    check_sampling(chat)
    check_web(chat)
    for given in filter(None, (chat.load, chat.adapter, chat.compare)):
        check_folder(Path(given))

    def work(layout: Layout) -> None:
        models = _open(chat, layout)
        with models.shared() as asks:
            if asks:
                _serve(chat, models) if chat.web else _talk(chat, models)

    asked = [Asked(load, adapter, chat.bf16) for load, adapter in _models(chat)]
    return in_layout(work, asked, parallel, processes, reads_input=not chat.web, together=True)


def check_web(chat: Chat) -> None:
    """Raise ConfigError for a port that is in use, before a model is loaded."""
    from megatron_ft.chat.ports import check_port
    from megatron_ft.launch.places import is_rank

    if chat.port is not None and not chat.web:
        raise ConfigError("--port is for --web: add it, or drop --port")
    if chat.web and not is_rank():
        check_port(_port(chat))


def _port(chat: Chat) -> int:
    return DEFAULT_PORT if chat.port is None else chat.port


def _models(chat: Chat) -> list[tuple[str, str | None]]:
    """Return folder and adapter of each model."""
    return [(chat.load, chat.adapter), *([(chat.compare, None)] if chat.compare else [])]


def _open(chat: Chat, layout: Layout) -> Models:
    from megatron_ft.chat.models import Models
    from megatron_ft.generation.loading import open_chat_model

    found = [
        open_chat_model(
            Path(load), layout, chat.chat_format, chat.bf16, chat.verify_checkpoint, chat.template_arguments,
            Path(adapter) if adapter else None,
        )
        for load, adapter in _models(chat)
    ]  # fmt: skip
    names = [f"{load} with {adapter}" if adapter else load for load, adapter in _models(chat)]
    return Models(found, names, layout)


def _settings(chat: Chat) -> Settings:
    from megatron_ft.chat.settings import Settings
    from megatron_ft.generation.sampling import Sampling

    sampling = Sampling(chat.temperature, chat.top_k, chat.top_p, chat.repetition_penalty)
    return Settings(chat.max_new_tokens, sampling, chat.seed, chat.stop)


def _talk(chat: Chat, models: Models) -> None:
    from megatron_ft.chat import lines
    from megatron_ft.chat.conversation import Conversation
    from megatron_ft.chat.screen import Screen
    from megatron_ft.chat.terminal import COMMANDS, Talk

    person = lines.is_terminal()
    read = (
        lines.in_terminal(lines.history_file() if chat.history else None, list(COMMANDS)) if person else lines.from_pipe
    )
    screen = Screen(models.names, person)
    talk = Talk(models, Conversation(chat.system, len(models.names)), _settings(chat), screen, interruptible=person)
    if person:
        screen.note("".join(f"{line}\n" for line in models.described) + "/help lists the commands, Ctrl-D leaves.\n")
    talk.run(lines.messages(read))


def _serve(chat: Chat, models: Models) -> None:
    from megatron_ft.chat.server import serve

    serve(models, _settings(chat), chat.system, _port(chat))


if __name__ == "__main__":
    sys.exit(run_script(COMMAND, run))
