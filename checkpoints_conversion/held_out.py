"""The tokens of --calibration: rows to calibrate with, and rows that are held out to compute the perplexity of."""

from __future__ import annotations

import numpy as np

from checkpoints_conversion.options import QuantisedExport
from megatron_ft.data.shards import open_shards
from megatron_ft.errors import ConfigError
from megatron_ft.models.architecture import Architecture
from megatron_ft.wording import counted

_HELD_OUT = 4
"""One row in so many is held out."""


def rows_of(options: QuantisedExport, arch: Architecture) -> tuple[np.ndarray, np.ndarray]:
    """Return rows of tokens for calibration and those that are held out: samples one after the other, cut into equal rows.

    Raise ConfigError for text that does not fit the model, or too little of it.
    """
    prefix, length = str(options.calibration), options.calibration_length
    check_layers(arch)
    if length > arch.max_position_embeddings:
        raise ConfigError(
            f"--calibration_length {length}: the model has {arch.max_position_embeddings} positions; choose fewer tokens"
        )
    wanted = options.calibration_rows + max(1, options.calibration_rows // _HELD_OUT)
    parts = _samples(prefix, wanted * length)
    found = sum(map(len, parts))
    if found < 2 * length:
        raise ConfigError(
            f"--calibration {prefix} has {counted(found, 'token')}, fewer than two rows of {length}: give more text, or a smaller "
            f"--calibration_length"
        )
    ids = np.concatenate(parts)[: min(wanted, found // length) * length]
    if ids.max() >= arch.vocab_size:
        raise ConfigError(
            f"--calibration {prefix} has the id {ids.max()}, the model {arch.vocab_size} tokens: pretokenize with the model's tokenizer"
        )
    rows = ids.reshape(-1, length)
    held_out = max(1, len(rows) // (_HELD_OUT + 1))
    return rows[:-held_out], rows[-held_out:]


def check_layers(arch: Architecture) -> None:
    """Raise ConfigError for a model whose layers are not of one kind: they are run in one layer of the engine."""
    if any(arch.layer(number) != arch.layer(0) for number in range(arch.num_layers)):
        raise ConfigError(
            f"this {arch.family} model has layers of several kinds (some with a window), which are not calibrated: drop --calibration, "
            f"and --quantize gptq or w4a16"
        )


def in_words(perplexity: tuple[float, float], held_out: np.ndarray) -> str:
    """Return the perplexity before and after, for the model card."""
    before, after = perplexity
    return f"{before:.5g} before, {after:.5g} after, on {held_out.size} further tokens in rows of {held_out.shape[1]}"


def _samples(prefix: str, count: int) -> list[np.ndarray]:
    """Return the tokens of as many samples as have `count` tokens, or of all."""
    shards = open_shards(prefix)
    parts: list[np.ndarray] = []
    found = 0
    for index in range(len(shards)):
        if found >= count:
            break
        parts.append(np.asarray(shards.tokens(index), np.int64))
        found += len(parts[-1])
    return parts
