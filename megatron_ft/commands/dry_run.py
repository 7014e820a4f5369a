"""finetune --dry_run: build and load everything, print what would be done, and stop before the first step."""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING

from megatron_ft.adapters.spec import Lora
from megatron_ft.checkpoints.folder import CheckpointConfig
from megatron_ft.data.loader import ChatDataset
from megatron_ft.engine.parallel import Layout
from megatron_ft.models.pipeline import split_layers
from megatron_ft.wording import counted, every, size

if TYPE_CHECKING:
    from megatron_ft.checkpoints.training_state import Progress
    from megatron_ft.config.settings import TrainingSettings


def show(
    layout: Layout,
    settings: TrainingSettings,
    described: CheckpointConfig,
    progress: Progress,
    train_set: ChatDataset,
    model: list,
    rows: int,
) -> int:
    """Print it on the main rank and return exit code 0. rows: of a global batch. progress: where the run would begin."""
    import torch.distributed as dist

    from megatron_ft import device
    from megatron_ft.checkpoints.load import chunks_of
    from megatron_ft.quantization.frozen import parameters

    dist.barrier()  # a rank that could not build or load has raised by now
    if layout.is_main:
        held = sum(parameters(chunk) for chunk in chunks_of(model))
        lines = _lines(layout, settings, described, progress, train_set, rows)
        print(
            f"dry run of {layout}: model built, weights loaded, {held:,} parameters on rank 0, on {device.describe()}"
        )
        print("\n".join(f"  {line}" for line in lines) + "\nnothing was written")
    return 0


def _lines(
    layout: Layout,
    settings: TrainingSettings,
    described: CheckpointConfig,
    progress: Progress,
    train_set: ChatDataset,
    rows: int,
) -> Iterator[str]:
    batch, data, save = settings.batch, settings.data, settings.checkpointing.save
    steps = max(0, batch.train_iters - progress.iteration)
    epochs = train_set.epochs_of(batch.train_iters * rows)
    yield f"would train iterations {progress.iteration + 1} to {batch.train_iters}: {counted(steps, 'step')}"
    micro = rows // batch.micro_batch_size // layout.dp_size
    yield (
        f"{counted(rows, 'row')} x {data.seq_length} = {counted(rows * data.seq_length, 'token')} per step, "
        f"{counted(micro, 'microbatch')} of {batch.micro_batch_size}; "
        f"{epochs:.2f} epochs of {train_set.num_samples:,} samples"
    )
    if save is None:
        yield "would save nothing: --save is not set"
        return
    interval = settings.checkpointing.save_interval
    when = f"{every(interval, 'step')} and at the end" if interval else "at the end"
    yield f"would save to {save} {when}, {size(_checkpoint_bytes(layout, settings, described))} each"


def _checkpoint_bytes(layout: Layout, settings: TrainingSettings, described: CheckpointConfig) -> float:
    from megatron_ft.planner import figures
    from megatron_ft.planner.memory import Job

    arch = described.architecture
    if described.adapter is not None:
        count = Lora.from_dict(described.adapter, arch).parameters(arch)
        return count * (14 if settings.numerics.bf16 or settings.numerics.fp16 else 12)
    small = settings.numerics.bf16 or settings.numerics.fp16
    job = Job(
        split_layers(arch.num_layers, settings.parallel),
        layout.tp_size,
        layout.dp_size,
        1,
        1,
        1,
        bf16=small,
        cp=layout.cp_size,
    )
    return figures.checkpoint(arch, job).bytes
