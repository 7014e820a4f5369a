"""Opens a Megatron checkpoint: this project's in either format, or Megatron-LLM's variant."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import torch
from torch import Tensor

from checkpoints_conversion.options import CheckpointSource, check_source
from megatron_ft.checkpoints.folder import CheckpointConfig, find_checkpoint, read_config, rules_in
from megatron_ft.digests import MANIFEST, has_digests
from megatron_ft.errors import CheckpointError, ConfigError, DamagedError
from megatron_ft.models.architecture import refuse_experts
from megatron_ft.models.dtypes import torch_dtype
from megatron_ft.models.families import family_of
from megatron_ft.models.quantised import QuantisedSource, Quantization, is_quantised, stored_rules
from megatron_ft.models.weights import Placed, Rule

if TYPE_CHECKING:
    from megatron_ft.data.tokenizer import Tokenizer


@dataclass(frozen=True)
class Opened:
    """An opened checkpoint: whole tensors by rule, and its description."""

    folder: Path
    config: CheckpointConfig
    rules: list[Rule]
    full: Callable[[Placed], Tensor]
    dtype: Callable[[Placed], torch.dtype]
    tokenizer: Tokenizer | None
    stated: dict[str, float] = field(default_factory=dict)
    """Settings of a Megatron-LLM checkpoint that the user gave."""
    base: Path | None = None
    """Of adapters that are opened merged: the checkpoint of their model."""
    onto: Literal["dequantized", "original"] | None = None
    """Of a base of adapters that were trained on its NF4: which of its weights `full` reads."""
    stored: Callable[[Placed], Tensor] | None = None
    """Of a quantised checkpoint: whole tensors of `rules_in(config)`, as they are stored. `full` dequantises."""

    def held(self) -> tuple[list[Rule], Callable[[Placed], Tensor]]:
        """Return the rules of what the ranks of a model hold, and the reader of whole tensors of them."""
        config = self.config
        if self.stored is None or config.quantization is None:
            return self.rules, self.full
        source = QuantisedSource(config.architecture, config.quantization, torch_dtype(config.dtype), self.stored)
        return stored_rules(self.rules, Quantization()), source.expanded

    def files(self) -> list[Path]:
        """Return all its files."""
        return sorted(path for path in self.folder.rglob("*") if path.is_file())


def open_megatron(root: Path, wanted: CheckpointSource) -> Opened:
    """Open the checkpoint at root, or the one that root's tracker or `wanted` names.

    Raise CheckpointError if it cannot be read, ConfigError for an invalid iteration.
    """
    from checkpoints_conversion.megatron_llm import is_dialect

    root, iteration = Path(root), parse_iteration(wanted.iteration)
    folder = root if iteration is None and root.is_dir() and is_dialect(root) else find_checkpoint(root, iteration)
    check_source(folder, wanted.verify_checkpoint)
    stated = _stated(wanted)
    if is_dialect(folder):
        return _open_dialect(folder, wanted.tokenizer, wanted.true_vocab_size, stated)
    if stated:
        raise ConfigError(
            f"--{next(iter(stated))} is only for a Megatron-LLM checkpoint; {folder} records its own value"
        )
    from checkpoints_conversion.tokenizer_copy import load_copy

    config = read_config(folder)
    if config.adapter is not None:
        raise CheckpointError(
            f"{folder} holds adapters, not a model: merge them with their model (megatron-ft merge-adapter), or export them alone "
            f"(megatron-ft megatron-to-hf --adapter_only)"
        )
    if wanted.verify_checkpoint and config.digested and not has_digests(folder):
        raise DamagedError(
            f"{folder / MANIFEST} is missing: the checkpoint is incomplete; restore it (or add --no_verify_checkpoint to skip this check)"
        )
    source = open_source(folder, config)
    rules, tokenizer = family_of(config.architecture).rules(config.architecture), load_copy(folder, config)
    if config.quantization is None:
        return Opened(folder, config, rules, source.full, source.dtype, tokenizer)
    kind = torch_dtype(config.dtype)
    quantised = QuantisedSource(config.architecture, config.quantization, kind, source.full)
    return Opened(
        folder, config, rules, quantised.dense, lambda one: kind if is_quantised(one.rule) else source.dtype(one),
        tokenizer, stored=source.full,
    )  # fmt: skip


def open_base(folder: Path, wanted: CheckpointSource) -> Opened:
    """Open the checkpoint of the model that adapters belong to. --iteration is the adapters'."""
    return open_megatron(folder, replace(wanted, iteration=None))


def open_source(folder: Path, config: CheckpointConfig) -> Any:
    """Return the reader for a checkpoint of this project, by its format."""
    from checkpoints_conversion.classic import ClassicSource
    from checkpoints_conversion.torch_dist import TorchDistSource

    refuse_experts(config.architecture)
    source = TorchDistSource if config.ckpt_format == "torch_dist" else ClassicSource
    return source(folder, config, rules_in(config))


def _stated(wanted: CheckpointSource) -> dict[str, float]:
    """Return the settings that are given. Raise ConfigError for a value that no model has."""
    from checkpoints_conversion.megatron_llm_args import LOST

    given = {name: getattr(wanted, name) for name in LOST if getattr(wanted, name) is not None}
    for name, value in given.items():
        least = 1 if name == "rope_scaling_factor" else 0
        if not least <= value < float("inf") or value == 0:
            raise ConfigError(f"--{name} {value:g}: must be {'at least 1' if least else 'above 0'}")
    return given


def _open_dialect(folder: Path, tokenizer: str | None, true_vocab_size: int | None, stated: dict[str, float]) -> Opened:
    from checkpoints_conversion.megatron_llm import MegatronLlmSource
    from megatron_ft.data.tokenizer import load_tokenizer

    loaded = load_tokenizer(Path(tokenizer)) if tokenizer else None
    size = true_vocab_size or (loaded.vocab_size if loaded else None)
    if size is None:
        raise ConfigError(
            f"{folder} is a Megatron-LLM checkpoint, which does not record the vocabulary size without padding: "
            "set --tokenizer or --true_vocab_size"
        )
    number = folder.name.removeprefix("iter_")
    source = MegatronLlmSource(folder, int(number) if number.isdigit() else "release", size, stated)
    ends = {"bos_token_id": loaded.bos_id, "eos_token_id": loaded.eos_id} if loaded else {}
    arch = replace(source.config.architecture, hf={key: index for key, index in ends.items() if index is not None})
    config = replace(source.config, architecture=arch, tokenizer=loaded.info() if loaded else {})
    return Opened(folder, config, source.rules, source.full, source.dtype, loaded, stated)


def parse_iteration(text: str | None) -> int | str | None:
    """Return the value of --iteration. Raise ConfigError if it is invalid."""
    if text is None or text == "release":
        return text
    if not text.isdigit():
        raise ConfigError(f"--iteration {text}: must be a number or release")
    return int(text)
