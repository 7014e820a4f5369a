"""The datasets of a run, and the rules between them and the checkpoint, checked without torch before processes wait for each other."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

import numpy as np

from megatron_ft.checkpoints.folder import CheckpointConfig
from megatron_ft.config.checks import shares_of_split
from megatron_ft.config.sections import Data, Distillation
from megatron_ft.data.foreign import open_any
from megatron_ft.data.loader import ChatDataset, Choices, NothingFits, Samples
from megatron_ft.data.manifest import check_tokenizer
from megatron_ft.data.plain import PlainShards, is_plain
from megatron_ft.data.roles import ALL_NAMES
from megatron_ft.data.shards import Shards
from megatron_ft.data.teacher_logits import TeacherLogits, description_path
from megatron_ft.data.trained_on import weights_of
from megatron_ft.data.verify import verify_shards
from megatron_ft.engine.parallel import local_rank
from megatron_ft.errors import DataError
from megatron_ft.log import logger
from megatron_ft.models.architecture import Architecture
from megatron_ft.wording import counted

log = logger("training")


def make_datasets(
    data: Data, checkpoint: CheckpointConfig, distillation: Distillation | None = None
) -> tuple[ChatDataset, ChatDataset | None]:
    """Return (training set, validation set or None). Raise DataError when shards and model do not belong together.

    distillation: names a teacher's stored log-probabilities of the training set. The validation set's are used if they are beside it.
    """
    weights = weights_of(data)
    train = _dataset(data.data_path, data, checkpoint, weights, shuffle=True)
    if train.over_long:
        log.warning(
            f"{train.over_long} of {train.num_samples} samples are longer than --seq_length {data.seq_length} + 1 and are "
            f"{FATE_OF_OVER_LONG[data.over_long]}; raise --seq_length, or choose otherwise with --over_long"
        )
    valid = _validation(data, checkpoint, weights)
    if distillation and distillation.teacher_logits:
        train.scored = scored(distillation.teacher_logits, train, data, checkpoint, distillation.kd_temperature)
        beside = [str(shard.prefix) for shard in valid.shards] if valid else []
        if valid and all(description_path(prefix).is_file() for prefix in beside):
            valid.scored = scored(beside, valid, data, checkpoint, distillation.kd_temperature)
    if data.verify_data and local_rank() == 0:
        for one in [*(train.scored or []), *((valid and valid.scored) or [])]:
            one.verify()
        # One process per machine, before others wait for it: a file system may return different bytes on each machine.
        verify_shards([*train.shards, *(valid.shards if valid else [])], "--no_verify_data")
    return train, valid


def scored(
    prefixes: list[str], dataset: ChatDataset, data: Data, checkpoint: CheckpointConfig, temperature: float
) -> list[TeacherLogits]:
    """Return a teacher's stored log-probabilities of a set's shards. Raise DataError if they are of something else."""
    if len(prefixes) != len(dataset.shards):
        raise DataError(
            f"--teacher_logits has {counted(len(prefixes), 'prefix')} for {len(dataset.shards)} --data_path: give one for each"
        )
    opened = [TeacherLogits(prefix) for prefix in prefixes]
    for one, shard in zip(opened, dataset.shards, strict=True):
        one.check(shard, checkpoint.architecture.vocab_size, data.seq_length, data.over_long, temperature)
        _check_teacher(one, checkpoint)
    if len({one.top_k for one in opened}) > 1:
        raise DataError(
            f"--teacher_logits: made with --top_k {', '.join(str(one.top_k) for one in opened)}: use one value"
        )
    return opened


def _check_teacher(one: TeacherLogits, checkpoint: CheckpointConfig) -> None:
    """Raise DataError unless the teacher had the model's tokenizer and, if it is of the same size, its RoPE scaling."""
    arch, where, made = checkpoint.architecture, description_path(one.prefix), one.described
    ours, theirs = checkpoint.tokenizer.get("fingerprint"), made["tokenizer"]
    if ours and theirs and ours != theirs:
        raise DataError(
            f"{where}: its teacher has another tokenizer ({theirs[:13]}) than the model ({ours[:13]}): score the shards with a teacher of "
            f"the model's tokenizer"
        )
    same = made["size"] == [arch.num_layers, arch.hidden_size]
    if same and made["rope"] != rope_of(arch):
        raise DataError(
            f"{where}: its teacher has the rotary embedding {made['rope']}, the model {rope_of(arch)}: score the shards with one like the "
            f"model's"
        )


def rope_of(arch: Architecture) -> dict[str, Any]:
    """Return what a model's rotary embedding depends on, as JSON."""
    return {"theta": arch.rope_theta, "scaling": arch.rope_scaling and dict(arch.rope_scaling)}


def _validation(data: Data, checkpoint: CheckpointConfig, weights: np.ndarray) -> ChatDataset | None:
    """Return the validation set, if there is one. An unusable one that was only found beside the training set is ignored."""
    split = shares_of_split(data)
    if split and not split[1]:
        return None
    paths = data.valid_data_path or _siblings(data.data_path)
    if split and all(map(is_plain, data.data_path)):
        paths = data.data_path
    elif split and not paths:
        raise DataError(
            f"--split {data.split}: shards with roles are divided when they are made: pretokenize with --val_split, and give "
            f"--data_path PREFIX-train; or train on all samples with --split 100,0,0"
        )
    try:
        return _dataset(paths, data, checkpoint, weights, shuffle=False) if paths else None
    except NothingFits as error:
        if data.valid_data_path:
            raise DataError(
                f"--valid_data_path {' '.join(paths)}: no sample fits --seq_length {data.seq_length} with --over_long {data.over_long}; "
                f"raise it, choose --over_long cut, or leave the flag out to train without evaluation"
            ) from error
        log.warning(
            f"{', '.join(paths)}: no sample fits --seq_length {data.seq_length} with --over_long {data.over_long}, so there is no "
            f"evaluation; raise it, or choose --over_long cut"
        )
        return None


FATE_OF_OVER_LONG = {"cut": "cut", "drop": "dropped", "split": "split over several rows"}


def _dataset(
    prefixes: list[str], data: Data, checkpoint: CheckpointConfig, weights: np.ndarray, shuffle: bool
) -> ChatDataset:
    shards = [_open(prefix, checkpoint, data, 0 if shuffle else 1) for prefix in prefixes]
    supervised = sum(loss_weight_of(shard, weights, data.marked_loss_weight) for shard in shards)
    if shuffle and supervised == 0:
        raise DataError(
            f"{', '.join(prefixes)}: no supervised token, every loss weight is 0 (there is no assistant turn): "
            f"check the chats, or train on all tokens with --scalar_loss_mask 1"
        )
    choices = Choices(
        data.seq_length, data.seed, packed=data.packing, shuffle=shuffle, over_long=data.over_long,
        variable=data.variable_seq_lengths, marked_loss_weight=data.marked_loss_weight,
        shares=tuple(data.data_weights) if shuffle and data.data_weights else None, shares_by=data.data_weights_by,
        cache=_plans(data), last_turn_only=data.last_turn_only,
    )  # fmt: skip
    return ChatDataset(shards, weights, choices)


def _plans(data: Data) -> str | None:
    """Return the folder where plans of epochs are kept."""
    if data.data_cache_path is not None:
        return None if data.data_cache_path == "none" else data.data_cache_path
    return str(Path(data.data_path[0]).parent / ".plans")


def _open(prefix: str, checkpoint: CheckpointConfig, data: Data, part: int) -> Samples:
    """Open role-labelled shards that fit the checkpoint's tokenizer, or plain pretraining shards. part: of --split."""
    vocab_size = checkpoint.architecture.vocab_size
    kind, expected = "gpt" if is_plain(prefix) else "instruction", data.data_type
    if expected not in (kind, None):
        has = (
            "are plain text, without roles"
            if kind == "gpt"
            else "have roles, and the assistant's tokens are trained on"
        )
        raise DataError(
            f"--data_type {expected}: the shards of {prefix} {has}; give --data_type {kind}, or other shards"
        )
    if kind == "gpt":
        split = shares_of_split(data)
        return PlainShards(prefix, vocab_size, (split, part) if split else None)
    shard = open_any(prefix, vocab_size, checkpoint.tokenizer)
    if isinstance(shard, Shards):
        check_tokenizer(shard.manifest, checkpoint.tokenizer, vocab_size, where=shard.prefix)
    return shard


def with_chat_format(checkpoint: CheckpointConfig, train_set: ChatDataset) -> CheckpointConfig:
    """Return the checkpoint's description, with the chat format of the shards if the conversion did not set one."""
    formats = [shard.manifest.chat_format for shard in train_set.shards]
    names = {known["name"] for known in formats if known.get("name") is not None}
    if len(names) > 1:
        log.warning(f"the shards use several chat formats ({', '.join(sorted(names))}): none is recorded for export")
    if checkpoint.chat_format and any("template" in shard.manifest.chat_format for shard in train_set.shards):
        log.warning(
            f"the shards use the tokenizer's own chat template, the checkpoint's chat format is {checkpoint.chat_format}, which "
            f"its export will use: convert it without --chat_format, or pretokenize with --chat_format {checkpoint.chat_format}"
        )
    if checkpoint.chat_format or len(names) != 1:
        return checkpoint
    return dataclasses.replace(checkpoint, chat_format=names.pop())


def loss_weight_of(shard: Samples, weights: np.ndarray, marked_loss_weight: float) -> float:
    """Sum of the loss weights of all tokens of some shards, by their manifest; marks count once at their weight."""
    weight_by_byte = shard.loss_weights(weights, marked_loss_weight)
    counts = shard.manifest.counts
    by_role = sum(weight_by_byte[role] * counts["tokens_by_role"].get(name, 0) for role, name in enumerate(ALL_NAMES))
    return float(by_role + marked_loss_weight * counts.get("marked_tokens", 0))


def _siblings(prefixes: list[str]) -> list[str]:
    """Return the PREFIX-val shards beside PREFIX-train ones."""
    found = [prefix[: -len("-train")] + "-val" for prefix in prefixes if prefix.endswith("-train")]
    return [prefix for prefix in found if Path(f"{prefix}-text.idx").is_file()]
