"""What finetune needs for --sample_prompts: the prompts as ids, and the model in training that answers them. Run by every rank."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch.distributed as dist
from megatron.core import parallel_state

from megatron_ft.checkpoints.folder import TOKENIZER_FOLDER, CheckpointConfig
from megatron_ft.config.settings import TrainingSettings
from megatron_ft.data.tokenizer import Tokenizer, load_tokenizer
from megatron_ft.engine.parallel import Layout
from megatron_ft.errors import ConfigError, TokenizerError
from megatron_ft.generation.loading import chat_format_of, prompt_ids, stop_ids_of
from megatron_ft.generation.prompts import read_references
from megatron_ft.generation.whole_rows import RowDecoder
from megatron_ft.training.samples import Sample, Sampler


@dataclass(frozen=True)
class _Asked:
    """The prompts of the file. ids: of each, as the model reads it."""

    prompts: list[dict[str, Any]]
    ids: list[Any]
    tokenizer: Tokenizer
    decoder: RowDecoder
    layout: Layout
    max_new_tokens: int

    def __call__(self) -> Sequence[Sample]:
        """Answer all prompts. Data-parallel ranks take every dp_size-th."""
        layout = self.layout
        given = self.decoder.generate(self.ids[layout.dp_rank :: layout.dp_size], self.max_new_tokens)
        mine = [self.tokenizer.decode(answer, skip_special=True).strip() for answer in given]
        shares: list[Any] = [None] * layout.dp_size
        dist.all_gather_object(shares, mine, group=parallel_state.get_data_parallel_group())
        answers = [shares[i % layout.dp_size][i // layout.dp_size] for i in range(len(self.prompts))]
        return [
            Sample(prompt["messages"], answer, prompt.get("answer"))
            for prompt, answer in zip(self.prompts, answers, strict=True)
        ]


def make_sampler(
    settings: TrainingSettings, source: Path, described: CheckpointConfig, model: list, layout: Layout
) -> Sampler | None:
    """Return what answers the prompts of --sample_prompts with `model`, None without the flag.

    Raise UserError for a checkpoint without a tokenizer and for a prompt that fills a row.
    """
    if not settings.logging.sample_prompts:
        return None
    if not described.tokenizer:
        raise TokenizerError(
            f"{source}: the checkpoint has no tokenizer, which --sample_prompts needs; convert it again with --tokenizer"
        )
    path, arch = Path(settings.logging.sample_prompts), described.architecture
    tokenizer = load_tokenizer(
        source / TOKENIZER_FOLDER, list(described.tokenizer["added_tokens"]), described.tokenizer.get("fingerprint")
    )
    chat = chat_format_of(described.chat_format, tokenizer)
    prompts = read_references(path)
    ids = [prompt_ids(prompt["messages"], tokenizer, chat) for prompt in prompts]
    longest = min(settings.data.seq_length, arch.max_position_embeddings)
    for number, prompt in enumerate(ids, 1):
        if not 0 < len(prompt) < longest:
            raise ConfigError(
                f"{path}, prompt {number}: has {len(prompt)} tokens; a row of this run has room for 1 to {longest - 1} and an answer: "
                f"change the prompt, or --seq_length"
            )
    tokens = settings.data.seq_length * settings.batch.micro_batch_size
    decoder = RowDecoder(model, layout, stop_ids_of(tokenizer, chat), arch.vocab_size, longest, tokens)
    return _Asked(prompts, ids, tokenizer, decoder, layout, settings.logging.sample_max_new_tokens)
