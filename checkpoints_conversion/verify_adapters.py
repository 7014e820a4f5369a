"""verify for a checkpoint of adapters: its base, and a PEFT folder or a merged model made of it."""

from __future__ import annotations

from dataclasses import fields
from pathlib import Path
from typing import Any, Protocol

import torch

from checkpoints_conversion.answers import LogitOptions, compare_answers
from checkpoints_conversion.certificate import Certificate, Weights, compare_weights, make_certificate
from checkpoints_conversion.megatron_source import parse_iteration
from checkpoints_conversion.merged import merged, open_both
from checkpoints_conversion.onto import IN_WORDS, Onto
from checkpoints_conversion.options import CheckpointSource
from megatron_ft.adapters.peft_files import is_peft, open_peft
from megatron_ft.adapters.stored import Stored
from megatron_ft.checkpoints.folder import CONFIG, find_checkpoint, read_config
from megatron_ft.errors import CheckpointError, ConfigError, UserError
from megatron_ft.models.architecture import Architecture
from megatron_ft.models.hf_source import HfSource


class _Options(Protocol):
    """The options of verify that are used here, besides those of LogitOptions."""

    @property
    def hf(self) -> str: ...
    @property
    def megatron(self) -> str: ...
    @property
    def base(self) -> str | None: ...
    @property
    def onto(self) -> Onto | None: ...
    @property
    def logits(self) -> bool: ...


def holds_adapters(root: Path, iteration: str | None) -> bool:
    """Return whether a checkpoint of this project holds adapters. False for what is none."""
    if not root.is_dir() or (not (root / CONFIG).is_file() and not any(root.iterdir())):
        return False
    try:
        return read_config(find_checkpoint(root, parse_iteration(iteration))).adapter is not None
    except UserError:  # opening it compares the digests first, and says what is damaged
        return False


def verify_adapters(options: _Options, source: CheckpointSource) -> Certificate:
    """Compare, and write certificate.json to the folder of the adapters. Raise CheckpointError for the first difference."""
    hf = Path(options.hf)
    opened, stored, described = open_both(Path(options.megatron), options.base, source, options.onto)
    base = {"folder": str(opened.folder), "equal": "bit for bit", "weights": stored.recorded}
    if is_peft(hf):
        if options.onto:
            raise ConfigError(f"--onto {options.onto}: {hf} holds adapters, which are not merged: drop --onto")
        if options.logits and given(options):
            raise ConfigError(f"{hf} holds adapters, whose logits are compared when merged: drop --{given(options)}")
        weights = compare_adapters(hf, stored, opened.config.architecture)
        return make_certificate(hf, merged(opened, stored, described, None), weights, None, base)
    if opened.onto:
        base["merged_onto"] = IN_WORDS[opened.onto]
    whole = merged(opened, stored, described, HfSource(hf).dtype)
    weights = compare_weights(hf, whole)
    answers = None
    if options.logits:
        logit_options = LogitOptions(**{each.name: getattr(options, each.name) for each in fields(LogitOptions)})
        answers = compare_answers(hf, whole, logit_options)
    return make_certificate(hf, whole, weights, answers, base)


def given(options: Any) -> str | None:
    """Return an option about logits that the user has set."""
    usual = LogitOptions()
    return next(
        (each.name for each in fields(LogitOptions) if getattr(options, each.name) != getattr(usual, each.name)), None
    )


def compare_adapters(folder: Path, stored: Stored, arch: Architecture) -> Weights:
    """Compare a PEFT folder with the adapters that it was exported from."""
    peft = open_peft(folder, arch)
    for name, theirs, ours in (("r", peft.lora.rank, stored.lora.rank), ("scale", peft.lora.scale, stored.lora.scale)):
        if theirs != ours:
            raise CheckpointError(f"{name}: {theirs} in {folder}, {ours} in {stored.folder}")
    if peft.lora.targets != stored.lora.targets:
        raise CheckpointError(
            f"modules: {', '.join(peft.lora.targets)} in {folder}, {', '.join(stored.lora.targets)} in {stored.folder}"
        )
    if peft.lora.new_tokens != stored.lora.new_tokens:
        raise CheckpointError(f"the tokens whose rows are trained are not the same in {folder} and {stored.folder}")
    shapes = stored.lora.shapes(arch)
    for name in shapes:
        one, other = peft.read(name), stored.read(name)
        if one.dtype != other.dtype or not torch.equal(one, other):
            raise CheckpointError(f"{peft.names[name]} differs between {folder} and {stored.folder}")
    return Weights(len(shapes), stored.lora.parameters(arch), 0)
