"""What tune chooses, and why: chat format, length of a row, batch, layout, learning rate, warm-up. Flags of the user come first."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

import numpy as np

from megatron_ft.config.settings import TrainingSettings
from megatron_ft.data.chat_format import FORMATS, OWN_TEMPLATE, get_format
from megatron_ft.data.loader import ChatDataset, Choices
from megatron_ft.data.shards import open_shards
from megatron_ft.data.tokenizer import load_tokenizer
from megatron_ft.data.trained_on import weights_of
from megatron_ft.tune.choice import Choice
from megatron_ft.tune.layout import layout
from megatron_ft.tune.look import Chats, Machine, Model
from megatron_ft.tune.rates import rate
from megatron_ft.wording import counted

UNIT = 64
"""Rows are multiples of it, which every tensor parallel size divides."""
LONGEST_ROW = 4096
WORTH_LONG_ROWS = 1000
"""Rows of an epoch from which on they are made longer than the longest chat, which is faster."""
STEPS = 100
"""Optimizer steps that a run should have at least, where the data has as many rows."""
MOST_ROWS = 64
"""Rows of a step at most."""
OTHER_WARMUPS = {"lr_warmup_fraction", "lr_warmup_samples"}
"""Flags that give the warm-up in another unit."""


def chat_format(model: Model, given: str | None) -> tuple[str, str]:
    """Return the name of the chat format, and why. Raise ConfigError for an unknown one."""
    if given is not None:
        if given != OWN_TEMPLATE:
            given = get_format(given).name
        return given, "as given"
    if model.has_template:
        return OWN_TEMPLATE, "the model's own chat template"
    if model.arch.family == "falcon":
        return "alfred", "a Falcon without a chat template; Alfred's format was made for it"
    return "chatml", "the model has no chat template"


def choose(
    model: Model, chats: Chats, machine: Machine, given: Mapping[str, Any], settings: TrainingSettings, name: str,
    epochs: float, lora: bool,
) -> Choice:  # fmt: skip
    """Return every choice but the chat format. given: flags of finetune by the user. settings: with these flags. name: the chat format."""
    choice = Choice()
    if lora:
        _adapters(choice, model, given, name)
    length = int(choice.take(given, "seq_length", *row_length(chats.lengths, model.arch.max_position_embeddings)))
    rows = _rows(chats, settings, length)
    total = rows.rows_of(epochs) if "train_iters" not in given else settings.batch.train_iters * MOST_ROWS
    batch = int(choice.take(given, "global_batch_size", *batch_size(total, machine.gpus)))
    layout(choice, model, machine, given, settings, length, batch)
    if "train_iters" in given:
        choice.steps = settings.batch.train_iters
        choice.take(given, "train_iters", choice.steps, "")
    else:
        choice.steps = max(1, -(-total // batch))
        why = f"{counted(choice.steps, 'step')} of {counted(batch, 'row')}; an epoch has about {counted(rows.rows_of(1), 'row')}"
        choice.take({}, "epochs", f"{epochs:g}", why)
    _schedule(choice, model, given, epochs, lora)
    return choice


def row_length(lengths: np.ndarray, positions: int) -> tuple[int, str]:
    """Return the length of a row, and why. lengths: tokens of the samples. positions: of the model."""
    limit = min(positions, LONGEST_ROW)
    most, longest = float(np.percentile(lengths, 99)), int(lengths.max())
    wanted = longest if longest <= 1.5 * most else math.ceil(most)
    needed = -(-(wanted - 1) // UNIT) * UNIT
    why = "holds the longest chat" if wanted == longest else "holds 99% of the chats"
    while needed * 2 <= min(limit, 2048) and lengths.sum() / (needed * 2) >= WORTH_LONG_ROWS:
        needed, why = needed * 2, "several chats in a row"
    if needed > limit:
        needed = limit // UNIT * UNIT or limit
        why = "the model's positions" if limit == positions else "longer rows need much memory"
    cut = int((lengths > needed + 1).sum())
    return needed, why + (f"; cut: {counted(cut, 'longer chat')}" if cut else "")


def _rows(chats: Chats, settings: TrainingSettings, length: int) -> ChatDataset:
    data = settings.data
    choices = Choices(length, data.seed, packed=data.packing, over_long=data.over_long)
    return ChatDataset([open_shards(f"{chats.prefix}-train")], weights_of(data), choices)


def batch_size(rows: int, gpus: int) -> tuple[int, str]:
    """Return the rows of a step, and why. rows: of the whole run."""
    fitting = max(1, rows // STEPS)
    size = min(MOST_ROWS, 1 << (fitting.bit_length() - 1))
    unit = max(1, gpus)
    whole = -(-size // unit) * unit
    why = f"at least {STEPS} steps" if rows >= STEPS else "few chats, so small steps and many of them"
    why = "large enough for steady gradients" if size == MOST_ROWS else why
    return whole, why if whole == size else f"one row for each of {counted(gpus, 'GPU')}"


def _adapters(choice: Choice, model: Model, given: Mapping[str, Any], name: str) -> None:
    hidden = model.arch.hidden_size
    rank, why = (64, "as QLoRA") if hidden >= 1024 else (max(4, hidden // 16), "a sixteenth of the model's width")
    choice.take(given, "lora_rank", rank, why)
    choice.take(given, "lora_alpha", rank if hidden < 1024 else 16, "as the rank" if hidden < 1024 else "as QLoRA")
    if added_tokens(model, name):
        choice.take(given, "train_new_tokens", True, f"{name} adds tokens to the vocabulary")


def added_tokens(model: Model, name: str) -> list[str]:
    """Return the tokens of a chat format that the model's vocabulary does not have."""
    if name == OWN_TEMPLATE:
        return []
    tokenizer = load_tokenizer(model.folder)
    return [token for token in FORMATS[name].added_tokens if not tokenizer.has(token)]


def _schedule(choice: Choice, model: Model, given: Mapping[str, Any], epochs: float, lora: bool) -> None:
    published = rate(model.parameters, lora)
    choice.take(given, "lr", f"{published.lr:g}", published.source)
    if not given.keys() & OTHER_WARMUPS:
        warmup = min(math.ceil(0.03 * choice.steps), choice.steps - 1)
        choice.take(given, "lr_warmup_iters", warmup, "3% of the steps, as Alpaca")
    an_epoch = max(1, math.ceil(choice.steps / max(1.0, epochs)))
    choice.take(given, "eval_interval", an_epoch, "once an epoch")
    choice.take(given, "save_interval", an_epoch, "once an epoch, to go on from there")
    choice.take(given, "keep_last", 1, "only the newest")
