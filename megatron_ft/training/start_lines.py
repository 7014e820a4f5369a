"""The four lines at the start of a run: the model, its data, its steps, and where its files go."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from megatron_ft import device
from megatron_ft.adapters.spec import BASE
from megatron_ft.checkpoints.folder import CheckpointConfig
from megatron_ft.checkpoints.training_state import Progress
from megatron_ft.config.sections import Checkpointing, Numerics
from megatron_ft.config.settings import TrainingSettings
from megatron_ft.data.loader import ChatDataset
from megatron_ft.engine.parallel import Layout
from megatron_ft.models.trainable import Trainable, count
from megatron_ft.training.adapting import Adapting
from megatron_ft.wording import counted, every, human


@dataclass(frozen=True)
class Start:
    """What a run starts with. source: folder of the checkpoint. rows: of a step. folder: for its files, None if nothing is written."""

    settings: TrainingSettings
    layout: Layout
    source: Path
    described: CheckpointConfig
    trainable: Trainable
    adapting: Adapting | None
    train_set: ChatDataset
    valid_set: ChatDataset | None
    rows: int
    progress: Progress
    folder: Path | None

    def lines(self) -> Iterator[str]:
        """Yield the four lines."""
        yield f"model:  {self._model()}"
        yield f"data:   {self._data()}"
        yield f"steps:  {self._steps()}"
        yield f"output: {_output(self.settings.checkpointing, self.folder)}"

    def _model(self) -> str:
        arch, teacher = self.described.architecture, self.settings.distillation.teacher
        own, whole = count(arch, BASE if self.adapting else self.trainable)
        text = f"{arch.family}, {human(whole)} parameters in {_precision(self.settings.numerics)}, from {self.source}"
        if self.adapting:
            lora = self.adapting.lora
            own = lora.parameters(arch)
            base = f" of {self.adapting.base}" if self.adapting.base != self.source else ""
            text += f"; LoRA of rank {lora.rank}{base}"
        if own < whole:
            text += f"; {own:,} parameters are trained ({own / whole:.2%})"
        return text + (f"; teacher {teacher}" if teacher else "")

    def _data(self) -> str:
        train, valid = self.train_set, self.valid_set
        tokens = sum(int(shard.lengths.sum()) for shard in train.shards)
        text = (
            f"{counted(train.num_samples, 'sample')} ({counted(tokens, 'token')}) in "
            f"{counted(len(train.epoch_rows(0)), 'row')} of {train.seq_length}, {train.fill():.1%} of positions filled"
        )
        return text + (f"; {counted(valid.num_samples, 'sample')} to validate on" if valid else "; none to validate on")

    def _steps(self) -> str:
        batch, begun = self.settings.batch, self.progress.iteration
        left = max(0, batch.train_iters - begun)
        where = f"{counted(self.layout.world_size, 'process')} on {device.gpu_name() or 'CPU'}"
        epochs = self.train_set.epochs_of(batch.train_iters * self.rows)
        text = f"{counted(left, 'step')} of {counted(self.rows, 'row')}, {epochs:.2f} epochs in all; {self.layout}: {where}"
        if begun:
            text += f"; resuming at iteration {begun}, {counted(self.progress.consumed_samples, 'row')} consumed"
        return text


def _precision(numerics: Numerics) -> str:
    return "bf16" if numerics.bf16 else "fp16" if numerics.fp16 else "fp32"


def _output(checkpointing: Checkpointing, folder: Path | None) -> str:
    interval = checkpointing.save_interval
    when = f"{every(interval, 'step')} and at the end" if interval else "at the end"
    saves = f"a checkpoint {when} in {checkpointing.save}" if checkpointing.save else "no checkpoint: --save is not set"
    if folder is None:
        return saves
    return (
        f"{saves}; log and metrics in {folder}"
        if str(folder) != checkpointing.save
        else f"{saves}, with log and metrics"
    )
