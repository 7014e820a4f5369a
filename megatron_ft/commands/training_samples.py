"""What finetune needs for answers before, during and after training: prompts as ids, and the model in training that answers them. Run by
every rank."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch.distributed as dist
from megatron.core import parallel_state

from megatron_ft.checkpoints.folder import TOKENIZER_FOLDER, CheckpointConfig
from megatron_ft.config.settings import TrainingSettings
from megatron_ft.data.loader import ChatDataset
from megatron_ft.data.questions import choose, frames_of, opening_of
from megatron_ft.data.tokenizer import Tokenizer, load_tokenizer
from megatron_ft.engine.parallel import Layout
from megatron_ft.errors import ConfigError, TokenizerError
from megatron_ft.generation.loading import chat_format_of, prompt_ids, stop_ids_of
from megatron_ft.generation.prompts import read_references
from megatron_ft.generation.whole_rows import RowDecoder
from megatron_ft.training.careful import all_well, careful
from megatron_ft.training.samples import Sample, Sampler
from megatron_ft.wording import counted


@dataclass(frozen=True)
class Asking:
    """The model in training, and what its answers depend on. source, described: of the checkpoint. model: its chunks."""

    settings: TrainingSettings
    source: Path
    described: CheckpointConfig
    model: list
    layout: Layout

    @property
    def longest(self) -> int:
        """Tokens of prompt and answer together."""
        return min(self.settings.data.seq_length, self.described.architecture.max_position_embeddings)

    def tokenizer(self) -> Tokenizer:
        """Return the checkpoint's tokenizer, which it must have."""
        known = self.described.tokenizer
        return load_tokenizer(self.source / TOKENIZER_FOLDER, list(known["added_tokens"]), known.get("fingerprint"))

    def decoder(self, tokenizer: Tokenizer, chat: Any) -> RowDecoder:
        """Return what answers with the model."""
        tokens = self.settings.data.seq_length * self.settings.batch.micro_batch_size
        vocab_size = self.described.architecture.vocab_size
        return RowDecoder(self.model, self.layout, stop_ids_of(tokenizer, chat), vocab_size, self.longest, tokens)


@dataclass(frozen=True)
class _Asked:
    """Prompts, each a Sample without an answer yet. ids: of each, as the model reads it."""

    prompts: list[Sample]
    ids: list[Any]
    tokenizer: Tokenizer
    decoder: RowDecoder
    layout: Layout
    max_new_tokens: int

    def answers(self) -> list[str]:
        """Answer the prompts of this rank's replica: every dp_size-th. All ranks of a replica call it."""
        layout = self.layout
        given = self.decoder.generate(self.ids[layout.dp_rank :: layout.dp_size], self.max_new_tokens)
        return [self.tokenizer.decode(answer, skip_special=True).strip() for answer in given]

    def gather(self, mine: list[str]) -> Sequence[Sample]:
        """Return all prompts with the answers of all replicas. All ranks call it."""
        layout = self.layout
        shares: list[Any] = [None] * layout.dp_size
        dist.all_gather_object(shares, mine, group=parallel_state.get_data_parallel_group())
        answers = [shares[i % layout.dp_size][i // layout.dp_size] for i in range(len(self.prompts))]
        return [prompt.answered(answer) for prompt, answer in zip(self.prompts, answers, strict=True)]


def make_sampler(asking: Asking, train_set: ChatDataset, valid_set: ChatDataset | None) -> tuple[Sampler | None, str]:
    """Return what answers the prompts of --sample_prompts, else some chats of the data, with the model; None: nothing is to be answered,
    and why, "" if nothing was asked for.

    Raise UserError for a checkpoint without a tokenizer and for a prompt that fills a row. Of the chats of the data nothing is an error.
    """
    logging = asking.settings.logging
    if logging.sample_prompts:
        return careful("answers to --sample_prompts", _of_file(asking)), ""
    if not logging.sample_chats or not logging.is_watched(asking.settings.checkpointing):
        return None, ""
    asked, problem = None, ""
    try:
        asked, problem = _of_data(asking, valid_set or train_set)
    except Exception as error:  # answers must not end a run
        problem = f"{type(error).__name__}: {' '.join(str(error).split())}"
    if all_well(asked is not None) and asked:
        return careful("answers to chats of the data", asked), ""
    return None, f"no answers before and after training: {problem or 'another process failed'}"


def _of_file(asking: Asking) -> _Asked:
    if not asking.described.tokenizer:
        raise TokenizerError(
            f"{asking.source}: the checkpoint has no tokenizer, which --sample_prompts needs; convert it again with --tokenizer"
        )
    logging = asking.settings.logging
    path, tokenizer = Path(str(logging.sample_prompts)), asking.tokenizer()
    chat = chat_format_of(asking.described.chat_format, tokenizer)
    prompts = read_references(path)
    ids = [prompt_ids(prompt["messages"], tokenizer, chat) for prompt in prompts]
    for number, prompt in enumerate(ids, 1):
        if not 0 < len(prompt) < asking.longest:
            raise ConfigError(
                f"{path}, prompt {number}: has {counted(len(prompt), 'token')}; a row of this run has room for 1 to {asking.longest - 1} "
                f"and an answer: change the prompt, or --seq_length"
            )
    samples = [Sample(prompt["messages"], "", prompt.get("answer")) for prompt in prompts]
    decoder = asking.decoder(tokenizer, chat)
    return _Asked(samples, ids, tokenizer, decoder, asking.layout, logging.sample_max_new_tokens)


def _of_data(asking: Asking, data: ChatDataset) -> tuple[_Asked | None, str]:
    """Return questions of the data, or None and the reason."""
    logging, layout = asking.settings.logging, asking.layout
    if layout.cp_size > 1:
        return None, f"--context_parallel_size {layout.cp_size} shares the positions of a row"
    if not asking.described.tokenizer:
        return None, "the checkpoint has no tokenizer"
    tokenizer = asking.tokenizer()
    chat = chat_format_of(asking.described.chat_format, tokenizer)
    stops = sorted(stop_ids_of(tokenizer, chat))
    found = choose(data.shards, logging.sample_chats, asking.longest, opening_of(chat, tokenizer), stops)
    if not found:
        return None, "the shards have no chat with a short question and an answer"
    frames = frames_of(chat, tokenizer)
    samples = [
        Sample(
            one.messages(tokenizer, frames), "", tokenizer.decode(one.answer, skip_special=True).strip(), judged=False
        )
        for one in found
    ]
    length = min(logging.sample_max_new_tokens, max(len(one.answer) for one in found) + 1)
    prompts = [one.prompt for one in found]
    return _Asked(samples, prompts, tokenizer, asking.decoder(tokenizer, chat), layout, length), ""
