"""Load a chat model (weights, tokenizer, chat format) from a checkpoint or from a Hugging Face export.

Both kinds of folder contain the architecture, so no flag about the model is needed. Training loads with its own code (training/fit).
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np

from megatron_ft.adapters.peft_files import is_peft
from megatron_ft.checkpoints.fill import fill_from
from megatron_ft.checkpoints.folder import (
    TOKENIZER_FOLDER,
    check_folder,
    check_quantised,
    describe,
    export_dtype,
    find_checkpoint,
    is_export,
    vocab_rows,
)
from megatron_ft.checkpoints.load import load_weights
from megatron_ft.checkpoints.quantised import nf4_of
from megatron_ft.checkpoints.verify import verify
from megatron_ft.data.chat_format import FORMATS, ChatFormat, get_format
from megatron_ft.data.chat_template import NoTemplate, OwnTemplate, own_template
from megatron_ft.data.template_options import TemplateOptions, parse_arguments, today
from megatron_ft.data.tokenizer import Tokenizer, load_tokenizer
from megatron_ft.data.tokenizer_files import has_tokenizer
from megatron_ft.digests import check_digests, has_digests
from megatron_ft.engine.collective_errors import raise_together
from megatron_ft.engine.parallel import Layout
from megatron_ft.errors import CheckpointError, DamagedError, DataError, TokenizerError
from megatron_ft.files import read_text
from megatron_ft.generation.answer import Answer
from megatron_ft.generation.decoding import Decoder
from megatron_ft.generation.sampling import Sampling
from megatron_ft.generation.stop_strings import StopStrings
from megatron_ft.generation.streaming import TextStream
from megatron_ft.log import logger
from megatron_ft.models.architecture import Architecture, check_layout
from megatron_ft.models.build import BuildOptions, build_model
from megatron_ft.models.hf_source import HfSource

log = logger("generation")

_Read = tuple[Any, Architecture, Tokenizer, str | None]
"""The model, its architecture, its tokenizer, the name of its chat format."""


@dataclass(frozen=True)
class ChatModel:
    """A decoder with its tokenizer and chat format."""

    decoder: Decoder
    tokenizer: Tokenizer
    chat_format: ChatFormat | OwnTemplate | None

    def prompt_ids(self, messages: list[dict[str, str]]) -> np.ndarray:
        """Return the ids of a conversation for the assistant to continue; without a chat format those of its last message's text."""
        return prompt_ids(messages, self.tokenizer, self.chat_format)

    def answers(
        self,
        conversations: list[list[dict[str, str]]],
        max_new_tokens: int,
        sampling: Sampling,
        batch_size: int = 32,
        seed: int = 0,
        stop: Sequence[str] = (),
    ) -> list[str]:
        """Return the assistant's next message in each conversation, stripped. All ranks of a model call it together.

        stop: strings that an answer ends before, besides the chat format's stop token.
        """
        prompts = [self.prompt_ids(messages) for messages in conversations]
        stops = StopStrings(stop, self.tokenizer.decode) if stop else None
        ids = self.decoder.generate(
            prompts, max_new_tokens, sampling, batch_size, seed, stops.is_over if stops else None
        )
        return [self._cut(answer, stops) for answer in ids]

    def stream(
        self, prompt: np.ndarray, max_new_tokens: int, sampling: Sampling, seed: int, stop: Sequence[str],
        show: Callable[[str], object], is_halted: Callable[[], bool],
    ) -> Answer:  # fmt: skip
        """Answer one prompt and pass the text to `show` as it grows. All ranks of a model call it together.

        is_halted: asked after each token; True, on all ranks, ends the answer.
        """
        stops = StopStrings(stop, self.tokenizer.decode) if stop else None
        text, halted = TextStream(self.tokenizer, stop), False

        def after_token(ids: list[int]) -> bool:
            nonlocal halted
            show(text.more(ids))
            halted = is_halted()
            return halted

        is_over = stops.is_over if stops else None
        (ids,) = self.decoder.generate([prompt], max_new_tokens, sampling, 1, seed, is_over, after_token=after_token)
        answer = self._cut(ids, stops)
        show(text.rest(answer))
        limit = min(max_new_tokens, self.decoder.max_positions - len(prompt))
        return Answer(answer, len(ids), len(ids) == limit and not (stops and stops.is_over(ids)), halted)

    def _cut(self, answer: list[int], stops: StopStrings | None) -> str:
        """Return an answer's text before the first stop string, without special tokens."""
        if stops is None:
            return self.tokenizer.decode(answer, skip_special=True).strip()
        whole = self.tokenizer.decode(answer)
        if (before := stops.cut(whole)) == whole:
            return self.tokenizer.decode(answer, skip_special=True).strip()
        for token in self.tokenizer.special_tokens:
            before = before.replace(token, "")
        return before.strip()


def prompt_ids(
    messages: list[dict[str, str]], tokenizer: Tokenizer, chat_format: ChatFormat | OwnTemplate | None
) -> np.ndarray:
    """Return the ids of a conversation for the assistant to continue; without a chat format those of its last message's text."""
    if chat_format is None:
        return tokenizer.encode(messages[-1]["content"])
    return chat_format.encode(tokenizer, messages, add_generation_prompt=True)[0]


def open_chat_model(
    folder: Path,
    layout: Layout,
    chat_format: str | None = None,
    bf16: bool | None = False,
    digests: bool = True,
    template_arguments: Sequence[str] = (),
    adapter: Path | None = None,
) -> ChatModel:
    """Load the checkpoint or export in `folder`. All ranks call it. Raise CheckpointError if it is neither.

    A checkpoint of adapters is loaded with the model that it names. adapter: a checkpoint of adapters, or a PEFT folder, for the model in
    `folder`.

    bf16: compute in bfloat16; None: only if `folder` is an export whose weights are.
    chat_format: overrides the one recorded in the folder. digests: first compare the files with digests.json, if it exists.
    template_arguments: variables for the tokenizer's own chat template, as name=value.
    """
    template = replace(today(), arguments=parse_arguments(template_arguments))
    check_folder(folder)
    exported = is_export(folder)
    options = _options(export_dtype(folder) == "bfloat16" if bf16 is None and exported else bool(bf16))
    read = _from_export if exported else _from_checkpoint
    later = adapter if adapter and (exported or is_peft(adapter)) else None
    model, arch, tokenizer, recorded = read(folder, layout, options, digests, None if later else adapter)
    if later:
        _add(later, model, arch, layout, folder)
    chat = _select_chat_format(chat_format or recorded, tokenizer, template)
    stops = stop_ids_of(tokenizer, chat)
    return ChatModel(Decoder(model, layout, stops, arch.max_position_embeddings), tokenizer, chat)


def open_bare(folder: Path, layout: Layout, bf16: bool, digests: bool) -> tuple[Any, Architecture, dict[str, Any]]:
    """Load the model in `folder`, a checkpoint or an export, which need not have a tokenizer. Return (model, its architecture, what is
    known of its tokenizer). All ranks call it. Raise CheckpointError for adapters.
    """
    check_folder(folder)
    options = _options(bf16)
    if is_export(folder):
        model, arch = _export_model(folder, layout, options, digests)
        return model, arch, load_tokenizer(folder).info() if has_tokenizer(folder) else {}
    found = find_checkpoint(folder)
    config = describe(found)
    if config.adapter is not None:
        raise CheckpointError(f"{found} holds adapters, not a model: merge them first, with megatron-ft megatron-to-hf")
    check_quantised(config, layout.tp_size)
    check_layout(config.architecture, layout.tp_size, layout.pp_size)
    verify(found, config, layout, digests)
    held = replace(options, padded_vocab_size=vocab_rows(config), nf4=nf4_of(config))
    model = build_model(config.architecture, layout, held)
    load_weights(found, config, model, layout, verified=True)
    return model, config.architecture, config.tokenizer


def stop_ids_of(tokenizer: Tokenizer, chat_format: ChatFormat | OwnTemplate | None) -> set[int]:
    """Return the ids that end an answer: of the end of text, and of the chat format's stop token."""
    stops = {tokenizer.eos_id} if tokenizer.eos_id is not None else set()
    if chat_format:
        stops.add(tokenizer.token_id(chat_format.stop_token))
    return stops


def chat_format_of(name: str | None, tokenizer: Tokenizer) -> ChatFormat | OwnTemplate | None:
    """Return the recorded chat format of that name, else the tokenizer's own template, else None for plain text."""
    return _select_chat_format(name, tokenizer, today())


def _add(adapter: Path, model: Any, arch: Architecture, layout: Layout, folder: Path) -> None:
    """Add a PEFT adapter, or one of a checkpoint to an export, to a loaded model."""
    from megatron_ft.adapters.adapted import add_adapters
    from megatron_ft.adapters.base import freeze
    from megatron_ft.adapters.stored import open_adapters

    stored = open_adapters(adapter, arch)
    add_adapters(model, arch, stored, layout, folder)
    if stored.nf4:
        freeze([model], HfSource(folder).dtype)


def _select_chat_format(
    name: str | None, tokenizer: Tokenizer, template: TemplateOptions
) -> ChatFormat | OwnTemplate | None:
    """Return the chat format of that name, else the tokenizer's own template, else None for plain text."""
    if name:
        return get_format(name, tokenizer, template)
    try:
        return own_template(tokenizer, template)
    except NoTemplate:
        return None
    except (TokenizerError, DataError) as error:
        log.warning(f"prompts are plain text without a chat format: {error}")
        return None


def _options(bf16: bool) -> BuildOptions:
    import torch

    return BuildOptions(dtype=torch.bfloat16 if bf16 else torch.float32)


def _from_checkpoint(root: Path, layout: Layout, options: BuildOptions, digests: bool, adapter: Path | None) -> _Read:
    """Load a checkpoint of a model or of adapters. adapter: a checkpoint of adapters for the model in `root`, or None."""
    folder = find_checkpoint(adapter or root)
    config = describe(folder)
    check_quantised(config, layout.tp_size)
    verify(folder, config, layout, digests)
    if config.adapter is not None:
        from megatron_ft.adapters.adapted import build_adapted

        model = build_adapted(folder, config, layout, options, str(root) if adapter else None, digests)
    elif adapter:
        raise CheckpointError(f"--adapter {adapter} holds a model, not adapters: give it with --load")
    else:
        held = replace(options, padded_vocab_size=vocab_rows(config), nf4=nf4_of(config))
        model = build_model(config.architecture, layout, held)
        load_weights(folder, config, model, layout, verified=True)
    if not config.tokenizer:
        raise TokenizerError(f"{folder}: the checkpoint has no tokenizer; convert it again with --tokenizer")
    tokenizer = load_tokenizer(
        folder / TOKENIZER_FOLDER, list(config.tokenizer["added_tokens"]), config.tokenizer.get("fingerprint")
    )
    return model, config.architecture, tokenizer, config.chat_format


def _from_export(folder: Path, layout: Layout, options: BuildOptions, digests: bool, _: Path | None = None) -> _Read:
    model, arch = _export_model(folder, layout, options, digests)
    template = folder / "chat_template.jinja"
    said = read_text(template) if template.is_file() else ""
    recorded = next((one.name for one in FORMATS.values() if one.is_said_by(said)), None)
    return model, arch, load_tokenizer(folder), recorded


def _export_model(folder: Path, layout: Layout, options: BuildOptions, digests: bool) -> tuple[Any, Architecture]:
    problem = None
    try:
        if digests and has_digests(folder):
            check_digests(folder, (layout.rank, layout.world_size))
    except DamagedError as error:
        problem = error
    raise_together(problem)
    source = HfSource(folder)
    arch = source.arch
    check_layout(arch, layout.tp_size, layout.pp_size)
    model = build_model(arch, layout, options)
    fill_from(model, arch, source.rules, source.full, layout)
    return model, arch
