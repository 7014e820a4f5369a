"""The datasets of a run, and what must hold between them and the checkpoint. Told without torch, before any process waits for
another.
"""

from __future__ import annotations

import dataclasses
from pathlib import Path

from megatron_ft.config.sections import Data
from megatron_ft.data.loader import ChatDataset
from megatron_ft.data.manifest import Manifest, check_tokenizer
from megatron_ft.data.roles import ROLE_NAMES, loss_weights
from megatron_ft.data.shards import open_shards
from megatron_ft.errors import ConfigError, DataError
from megatron_ft.log import logger
from megatron_ft.models.checkpoint_layout import CheckpointConfig

log = logger("training")


def make_datasets(data: Data, checkpoint: CheckpointConfig) -> tuple[ChatDataset, ChatDataset | None]:
    """(training set, validation set or None). Raises ConfigError for rows that are too long for the model, DataError when
    shards and model do not belong together.
    """
    positions = checkpoint.architecture.max_position_embeddings
    if data.seq_length > positions:
        raise ConfigError(f"--seq_length {data.seq_length} is beyond the model's {positions} positions: lower it")
    weights = loss_weights(data.scalar_loss_mask)
    train = _dataset(data.data_path, data, checkpoint, weights, shuffle=True)
    if train.truncated:
        log.warning(
            f"{train.truncated} of {train.num_samples} samples are longer than --seq_length {data.seq_length} + 1 "
            f"and lose their ends; raise --seq_length to keep them"
        )
    valid_paths = data.valid_data_path or _siblings(data.data_path)
    return train, _dataset(valid_paths, data, checkpoint, weights, shuffle=False) if valid_paths else None


def _dataset(prefixes: list[str], data: Data, checkpoint: CheckpointConfig, weights, shuffle: bool) -> ChatDataset:
    shards = [open_shards(prefix) for prefix in prefixes]
    supervised = 0.0
    for shard in shards:
        check_tokenizer(shard.manifest, checkpoint.tokenizer, checkpoint.architecture.vocab_size, where=shard.prefix)
        supervised += loss_weight_of(shard.manifest, weights)
    if shuffle and supervised == 0:
        raise DataError(
            f"{', '.join(prefixes)}: no supervised token, every loss weight is 0 (there is no assistant turn): "
            f"check the chats, or train on all tokens with --scalar_loss_mask 1"
        )
    return ChatDataset(shards, data.seq_length, weights, data.seed, packed=data.packing, shuffle=shuffle)


def with_chat_format(checkpoint: CheckpointConfig, train_set: ChatDataset) -> CheckpointConfig:
    """The checkpoint's description, its chat format taken from the shards where the conversion did not name one."""
    names = {shard.manifest.chat_format.get("name") for shard in train_set.shards} - {None}
    if len(names) > 1:
        log.warning(f"the shards speak several chat formats ({', '.join(sorted(names))}): none is recorded for export")
    if checkpoint.chat_format or len(names) != 1:
        return checkpoint
    return dataclasses.replace(checkpoint, chat_format=names.pop())


def loss_weight_of(manifest: Manifest, weights) -> float:
    """Sum of the loss weights [4] of all tokens of some shards."""
    counts = manifest.counts["tokens_by_role"]
    return float(sum(weights[role] * counts.get(name, 0) for role, name in enumerate(ROLE_NAMES)))


def _siblings(prefixes: list[str]) -> list[str]:
    """PREFIX-val shards beside PREFIX-train ones."""
    found = [prefix[: -len("-train")] + "-val" for prefix in prefixes if prefix.endswith("-train")]
    return [prefix for prefix in found if Path(f"{prefix}-text.idx").is_file()]
