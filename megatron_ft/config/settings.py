"""All settings of a training run, as one value. The only place that lists its sections and their order."""

from __future__ import annotations

from dataclasses import dataclass, field, fields
from typing import Any, Self

from megatron_ft.config.expected import Model
from megatron_ft.config.sections import (
    Adapters,
    Batch,
    Checkpointing,
    Data,
    Distillation,
    Kernels,
    Launching,
    Logging,
    Numerics,
    Optimizer,
    Parallelism,
    Stopping,
)

COMMON = (
    "load: checkpoint to start from",
    "save",
    "save_interval",
    "auto_resume: continue from the newest one in --save",
    "data_path: prefixes of the training shards",
    "valid_data_path",
    "seq_length: tokens per row",
    "train_iters: number of steps",
    "micro_batch_size: rows that a process computes at once",
    "global_batch_size: rows per optimizer step",
    "tensor_model_parallel_size: parts of each weight matrix (TP)",
    "pipeline_model_parallel_size: stages of the layers (PP)",
    "sequence_parallel: with TP: less memory for activations",
    "use_distributed_optimizer: split the optimizer state (ZeRO-1)",
    "lr: highest learning rate",
    "lr_warmup_iters: steps of the warm-up",
    "bf16: compute in bfloat16",
    "recompute_granularity: save memory: selective or full",
    "lora_rank: train LoRA adapters of this rank",
)
"""Flags that most training runs have, for the help of one screen (command.py)."""


@dataclass(frozen=True)
class TrainingSettings:
    """The settings of `megatron-ft finetune`: a field for each section, in the order of its help.

    A command that takes these settings lists this class among its sections, and its run() receives one instance.
    """

    checkpointing: Checkpointing = field(default_factory=Checkpointing)
    data: Data = field(default_factory=Data)
    batch: Batch = field(default_factory=Batch)
    parallel: Parallelism = field(default_factory=Parallelism)
    optimizer: Optimizer = field(default_factory=Optimizer)
    numerics: Numerics = field(default_factory=Numerics)
    adapters: Adapters = field(default_factory=Adapters)
    distillation: Distillation = field(default_factory=Distillation)
    logging: Logging = field(default_factory=Logging)
    model: Model = field(default_factory=Model)
    kernels: Kernels = field(default_factory=Kernels)
    launching: Launching = field(default_factory=Launching)
    stopping: Stopping = field(default_factory=Stopping)

    @classmethod
    def of(cls, **values: Any) -> Self:
        """Make settings from values by flag name, whatever their section. Raise TypeError for a name that no section has."""
        sections = {}
        for one in fields(cls):
            kind: Any = one.default_factory
            sections[one.name] = kind(**{f.name: values.pop(f.name) for f in fields(kind) if f.name in values})
        if values:
            raise TypeError(f"no section has {', '.join(sorted(values))}")
        return cls(**sections)

    @property
    def sections(self) -> tuple[Any, ...]:
        """The sections, in order."""
        return tuple(getattr(self, one.name) for one in fields(self))
