"""The flags of sparse decoding, for the commands that decode, and what they exclude."""

from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from megatron_ft.checkpoints.folder import check_whole
from megatron_ft.commands.layout_choice import Asked, GenerationLayout, sizes_for, stored
from megatron_ft.config.sections import Processes
from megatron_ft.errors import ConfigError


@dataclass
class SparseOptions:
    """Sparse decoding of models with ReLU, on a CPU and in one process"""

    sparse: Literal["exact", "predicted", "dense"] | None = None
    """exact: leave out what is zero, with the same result; predicted: also what --predictors calls zero; dense: leave out nothing"""
    sparse_weights: Literal["fp32", "bf16", "int8"] | None = None
    """with --sparse: precision of the weights; default: bf16 for a model in bf16, else fp32"""
    predictors: str | None = None
    """with --sparse predicted: folder that train-predictors has written for this model"""


def wait_asleep() -> None:
    """Let torch's threads sleep between operations. Those of a token are short, and waiting actively they would take the kernel's cores.

    Call it before torch is imported, which reads the variable.
    """
    os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")


def check_sparse_options(
    options: SparseOptions, models: Sequence[Asked], bf16: bool | None, parallel: GenerationLayout, processes: Processes
) -> None:
    """Raise UserError for flags, a layout or a model with which sparse decoding does not go together."""
    if options.sparse is None:
        if given := (options.sparse_weights and "--sparse_weights") or (options.predictors and "--predictors"):
            raise ConfigError(f"{given} needs --sparse exact or --sparse predicted")
        return
    if any(one.adapter for one in models):
        raise ConfigError("--sparse takes no --adapter: write the model with megatron-ft merge-adapter, and give that")
    if bf16 is not None:
        raise ConfigError(
            "--sparse takes no --bf16 or --no_bf16: give the precision of the weights with --sparse_weights"
        )
    for one in models:
        if config := stored(one):
            check_whole(one.load, config)
    tensor, pipeline = sizes_for(models, parallel, processes)
    check_one_process(processes, tensor * pipeline)
    for one in models:
        check_model(Path(one.load), options)


def check_one_process(processes: Processes, of_layout: int = 1) -> None:
    """Raise ConfigError if more than one process is asked for, needed by the layout, or has been started."""
    from megatron_ft.launch.places import is_rank, places

    count = int(os.environ["WORLD_SIZE"]) if is_rank() else max(places(processes).world_size, of_layout)
    if count > 1:
        raise ConfigError(
            f"--sparse decodes in one process, with its threads, and this would be {count}: leave out the layout"
        )


def check_model(folder: Path, options: SparseOptions) -> None:
    """Raise UserError for a model that cannot be decoded sparsely, or for predictors that are missing or do not fit."""
    from megatron_ft.generation.sparse_loading import described, predictors_of

    predictors_of(options.predictors, options.sparse, described(folder).arch)
