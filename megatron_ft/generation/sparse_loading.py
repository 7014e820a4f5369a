"""Opens a chat model to decode with sparse activations, on a CPU and in one process."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from megatron_ft.checkpoints.folder import (
    check_folder,
    check_whole,
    describe,
    export_dtype,
    find_checkpoint,
    hf_entries,
    is_export,
)
from megatron_ft.engine.parallel import Layout
from megatron_ft.errors import CheckpointError, ConfigError
from megatron_ft.generation.loading import ChatModel, open_chat_model
from megatron_ft.models.architecture import Architecture
from megatron_ft.models.families import parse_hf_config
from megatron_ft.sparse.mlp import Mode
from megatron_ft.sparse.model import SparseModel, check_sparse, firsts_digest, make_sparse, same_model
from megatron_ft.sparse.predictor_files import Stored, read_predictors
from megatron_ft.sparse.rows import Precision


@dataclass(frozen=True)
class Described:
    """What a folder says about its model, before its weights are read."""

    arch: Architecture
    precision: Precision
    """that of its weights: bf16, or fp32 for any other type"""


def described(folder: Path) -> Described:
    """Return the architecture of a checkpoint or export that can be decoded sparsely. Raise UserError for one that cannot."""
    check_folder(folder)
    if is_export(folder):
        said = hf_entries(folder)
        _refuse_quantised(folder, said.get("quantization_config"))
        _, arch = parse_hf_config(said)
        found = Described(arch, "bf16" if export_dtype(folder) == "bfloat16" else "fp32")
    else:
        found = _of_checkpoint(find_checkpoint(folder))
    check_sparse(found.arch)
    return found


def _refuse_quantised(folder: Path, quantization: Any) -> None:
    if quantization:
        raise CheckpointError(
            f"{folder} is quantised: give the model before quantisation; --sparse_weights int8 halves bf16"
        )


def _of_checkpoint(folder: Path) -> Described:
    config = describe(folder)
    if config.adapter is not None:
        raise ConfigError(f"{folder} holds adapters: write the model with megatron-ft merge-adapter, and give that")
    _refuse_quantised(folder, config.quantization)
    check_whole(folder, config)
    return Described(config.architecture, "bf16" if config.dtype == "bf16" else "fp32")


def predictors_of(folder: str | None, mode: Mode | None, arch: Architecture) -> Stored | None:
    """Return the predictors in a folder. Raise ConfigError unless they are given where the mode needs them, and only there."""
    if bool(folder) != (mode == "predicted"):
        raise ConfigError(
            "--sparse predicted needs --predictors DIR" if not folder else "--predictors needs --sparse predicted"
        )
    return read_predictors(Path(folder), arch) if folder else None


def open_sparse(
    folder: Path, layout: Layout, precision: Precision | None, mode: Mode, predictors: Stored | None = None,
    chat_format: str | None = None, digests: bool = True, template_arguments: Sequence[str] = (),
) -> tuple[ChatModel, SparseModel]:  # fmt: skip
    """Load a model and convert it. precision: of the weights; default: as they are stored.

    Raise CheckpointError for predictors of another model.
    """
    known = described(folder)
    chat = open_chat_model(folder, layout, chat_format, known.precision == "bf16", digests, template_arguments)
    if predictors and not same_model(predictors.model, firsts_digest(chat.decoder.model, known.arch)):
        raise CheckpointError(
            f"the predictors were trained for another model than {folder}; make them with megatron-ft train-predictors"
        )
    chosen = precision or known.precision
    sparse = make_sparse(chat.decoder.model, known.arch, chosen, mode)
    if predictors:
        sparse.predict_with(predictors.layers, "int8" if chosen == "int8" else "bf16")
    return chat, sparse
