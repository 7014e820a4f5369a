"""Choose the layout of a model that answers or is scored.

A classic checkpoint is bound to the layout that it was cut for. All other models load in any: one process on a CPU, on GPUs the fewest
whose memory suffices. A process that was started by a launcher chooses among the layouts that divide the number of processes; it finds
what the launcher found, since both know the same files and GPUs.
"""

from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from megatron_ft.config.sections import Processes
from megatron_ft.errors import ConfigError
from megatron_ft.wording import counted

if TYPE_CHECKING:
    from megatron_ft.checkpoints.folder import CheckpointConfig
    from megatron_ft.planner.answering import Reader


MOST_ON_CPU = 16
"""Processes that are started on a machine without GPUs, whatever its number of cores."""


@dataclass(frozen=True)
class GenerationLayout:
    """Parallel layout of the model; the remaining processes divide the prompts among them"""

    tensor_model_parallel_size: int | None = None
    """number of parts that each weight matrix is split into (TP); default: 1 with --pipeline_model_parallel_size, else that of a classic
    checkpoint, else for the fewest GPUs whose memory suffices; 1 on a CPU"""
    pipeline_model_parallel_size: int | None = None
    """number of pipeline stages that the layers are divided over (PP); default: chosen as the other size is"""


LAYOUT_FLAGS = (
    "tensor_model_parallel_size: parts of each weight matrix (TP)",
    "pipeline_model_parallel_size: stages of the layers (PP)",
    "nproc_per_node: processes on this machine, one per GPU",
)
"""Of a layout and its processes: the flags in a command's help of one screen."""


@dataclass(frozen=True)
class Asked:
    """A model and what it reads at once.

    bf16: compute in bfloat16; None: where an export's weights are. rows, length: of the largest batch; None: the model's positions.
    """

    load: str
    adapter: str | None = None
    bf16: bool | None = False
    rows: int = 1
    length: int | None = None


def sizes_for(
    models: Sequence[Asked], given: GenerationLayout, processes: Processes, together: bool = False
) -> tuple[int, int]:
    """Return TP and PP: the given ones, else those that all models load in. A launcher of a given number of processes chooses none.

    together: all models are in memory at once.
    Raise ConfigError where no layout fits, or where two models are bound to different ones.
    """
    from megatron_ft.launch.places import is_rank

    sizes = given.tensor_model_parallel_size, given.pipeline_model_parallel_size
    for name, size in zip(("tensor", "pipeline"), sizes, strict=True):
        if size is not None and size < 1:
            raise ConfigError(f"--{name}_model_parallel_size {size} must be at least 1")
    if any(sizes):
        return sizes[0] or 1, sizes[1] or 1
    if processes.nproc_per_node is not None and not is_rank():
        return 1, 1
    return bound_layout(models) or _fitting(models, together)


def bound_layout(models: Sequence[Asked]) -> tuple[int, int] | None:
    """Return the layout of the classic checkpoints among the models; None without any."""
    found: dict[tuple[int, int], str] = {}
    for one in models:
        config = stored(one)
        if config and config.ckpt_format == "torch":
            found[config.tensor_model_parallel_size, config.pipeline_model_parallel_size] = one.load
    if len(found) > 1:
        (first, here), (second, there) = list(found.items())[:2]
        raise ConfigError(
            f"{here} is in the classic format for TP{first[0]} x PP{first[1]}, {there} for TP{second[0]} x PP{second[1]}: make a "
            f"torch_dist checkpoint of one with megatron-ft reshard, which loads into any layout"
        )
    for sizes, load in found.items():
        _check_place(load, *sizes)
    return next(iter(found), None)


def _check_place(load: str, tensor: int, pipeline: int) -> None:
    """Raise ConfigError where this machine is too small for the processes that would be started here."""
    from megatron_ft import device
    from megatron_ft.launch.places import is_rank

    gpus = len(device.memories())
    if is_rank() or tensor * pipeline <= (gpus or max(MOST_ON_CPU, os.cpu_count() or 1)):
        return
    here = counted(gpus, "GPU") if gpus else "no GPU"
    raise ConfigError(
        f"{load} is in the classic format for TP{tensor} x PP{pipeline}, {counted(tensor * pipeline, 'process')}, and this "
        f"machine has {here}: start them on several machines (--nproc_per_node, --nnodes), or make a "
        f"torch_dist checkpoint with megatron-ft reshard"
    )


def stored(asked: Asked) -> CheckpointConfig | None:
    """Return the description of the checkpoint with a model's weights, below its adapters; None for an export."""
    from megatron_ft.adapters.find import find_base
    from megatron_ft.adapters.peft_files import is_peft
    from megatron_ft.checkpoints.folder import describe, find_checkpoint, is_export

    if is_export(Path(asked.load)):
        return None
    adapter = asked.adapter if asked.adapter and not is_peft(Path(asked.adapter)) else None
    folder = find_checkpoint(Path(adapter or asked.load))
    config = describe(folder)
    return config if config.adapter is None else describe(find_base(config, folder, asked.load if adapter else None))


def _fitting(models: Sequence[Asked], together: bool) -> tuple[int, int]:
    """Return the smallest layout that all models fit into; (1, 1) on a CPU."""
    from megatron_ft import device
    from megatron_ft.engine.parallel import world_size
    from megatron_ft.launch.places import is_rank
    from megatron_ft.planner.answering import smallest_layout

    memories = device.memories()
    if not memories:
        return 1, 1
    most = world_size() if is_rank() else len(memories)
    counts = [n for n in range(1, most + 1) if not is_rank() or most % n == 0]
    readers = [_reader(one) for one in models]
    if (found := smallest_layout(readers, counts, len(memories), min(memories), together)) is None:
        raise ConfigError(
            f"{models[0].load}: the model and a batch fit into no layout of {counted(most, 'GPU')} with {min(memories) / 1e9:.0f} GB: give "
            f"--bf16, a smaller --batch_size, shorter texts or more GPUs; or the sizes of a layout, to try it all the same"
        )
    return found


def _reader(asked: Asked) -> Reader:
    from megatron_ft.checkpoints.folder import export_dtype
    from megatron_ft.planner.answering import Reader
    from megatron_ft.planner.known import architecture

    config = stored(asked)
    arch = config.architecture if config else architecture(asked.load)
    bf16 = config is None and export_dtype(Path(asked.load)) == "bfloat16" if asked.bf16 is None else asked.bf16
    tokens = asked.rows * (asked.length or arch.max_position_embeddings)
    return Reader(arch, 2 if bf16 else 4, tokens, bool(config and config.quantization))
