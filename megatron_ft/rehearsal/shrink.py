"""Reduces a run: layers, widths, row length, batch and steps. Layout and all other settings are unchanged, except that context-parallel
processes become data-parallel replicas. Without torch.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from megatron_ft.adapters.spec import Lora
from megatron_ft.config.expected import Model
from megatron_ft.config.sections import (
    Adapters,
    Batch,
    Checkpointing,
    Data,
    Distillation,
    Launching,
    Logging,
    Numerics,
    Optimizer,
    Parallelism,
    Stopping,
)
from megatron_ft.models.architecture import Architecture
from megatron_ft.models.pipeline import split_layers

HEAD_DIM = 16
NF4_HEAD_DIM = 64
"""With this, the slices of a quantised model are whole blocks of NF4."""
RANK = 8
"""Of adapters whose own rank is in a checkpoint that is missing."""
STEPS = 3
SAVE_AT = 2
"""Step after which a run with --save_interval or --eval_interval saves or evaluates, besides the end."""
PROCESSES = 16
"""Largest number of processes on one machine, unless tensor and pipeline parallelism need more."""
_SHORT = 128


@dataclass(frozen=True)
class Change:
    """A setting that the rehearsal reduces."""

    what: str
    real: Any
    now: Any

    def __str__(self) -> str:
        return f"{self.what} {self.real} -> {self.now}"


def architecture(arch: Architecture, parallel: Parallelism, nf4: bool = False) -> Architecture:
    """Return one layer per chunk, as few query groups as TP allows, narrow heads; the vocabulary is kept for the real shards.

    nf4: the linears are to be quantised.
    """
    split = split_layers(arch.num_layers, parallel)
    tp = parallel.tensor_model_parallel_size
    groups = tp
    heads = groups * min(2, arch.num_attention_heads // arch.num_query_groups)
    head_dim = NF4_HEAD_DIM if nf4 else min(HEAD_DIM, arch.head_dim)
    hidden = heads * head_dim
    ffn = 2 * hidden if nf4 else min(2 * hidden, arch.ffn_hidden_size)
    return replace(
        arch.with_layers(split.stages * split.virtual_size), hidden_size=hidden,
        ffn_hidden_size=ffn,
        num_attention_heads=heads, num_query_groups=groups, head_dim=head_dim,
        full_attention_layers=min(1, arch.full_attention_layers),
    )  # fmt: skip


def parallelism(arch: Architecture, parallel: Parallelism) -> Parallelism:
    """Return the same number of stages and chunks, with one layer each. No context parallelism, which only GPUs can compute."""
    virtual = split_layers(arch.num_layers, parallel).virtual_size
    return replace(
        parallel, virtual_pipeline_model_parallel_size=virtual if virtual > 1 else None,
        context_parallel_size=1, num_layers_per_virtual_pipeline_stage=None, decoder_first_pipeline_num_layers=None,
        decoder_last_pipeline_num_layers=None, pipeline_model_parallel_layout=None,
    )  # fmt: skip


def seq_length(data: Data, parallel: Parallelism) -> int:
    tp = parallel.tensor_model_parallel_size
    return min(data.seq_length, -(-_SHORT // tp) * tp)


def batch(real: Batch, parallel: Parallelism, dp: int) -> Batch:
    """Return as many microbatches as stages, so that the pipeline is filled, with at most two rows each."""
    micro = min(real.micro_batch_size, 2)
    rows = micro * dp * max(2, parallel.pipeline_model_parallel_size)
    steps = STEPS if real.epochs is not None else min(STEPS, real.train_iters)
    return replace(real, micro_batch_size=micro, global_batch_size=rows, train_iters=steps, epochs=None)


def optimizer(real: Optimizer) -> Optimizer:
    """Return a schedule that fits into few steps, with a warm-up and a WSD decay of one step where there are any."""
    last = None if real.lr_wsd_decay_iters is None else 1
    first = min(1, real.lr_warmup_iters) if real.lr_warmup_fraction is None else int(real.lr_warmup_fraction > 0)
    return replace(real, lr_warmup_iters=first, lr_warmup_fraction=None, lr_decay_iters=None, lr_wsd_decay_iters=last)


def numerics(real: Numerics) -> Numerics:
    """Return one layer per recomputed group, because groups cannot be larger than a stage."""
    return replace(real, recompute_num_layers=1) if real.recompute_num_layers else real


def data_parallel(parallel: Parallelism, processes: int) -> int:
    """Return the number of data-parallel replicas to start on one machine."""
    model = parallel.model_parallel_size
    return max(1, min(processes // model, PROCESSES // model))


def adapters(real: Lora, nf4: bool) -> Adapters:
    """Return flags for new adapters like those of the run, which the small model cannot load. nf4: on a base that is quantised when it
    is loaded, also where that of the run is a quantised checkpoint.
    """
    return Adapters(
        real.rank, real.alpha, real.dropout, list(real.targets), real.rs, train_new_tokens=bool(real.new_tokens),
        base_precision="nf4" if nf4 else None,
    )  # fmt: skip


def unknown_adapters(real: Adapters) -> Adapters:
    """Return flags for new adapters where --load is missing. It may be the one that has their rank; a made-up one has no added tokens."""
    if real == Adapters():
        return real
    adapter = real.adapter if real.adapter and Path(real.adapter).exists() else None
    rank = RANK if real.lora_rank is None and adapter is None else real.lora_rank
    return replace(real, lora_rank=rank, adapter=adapter, base=None, train_new_tokens=False)


def unknown_teacher(real: Distillation) -> Distillation:
    """Return flags without a teacher that does not exist yet."""
    return real if real.teacher is None or Path(real.teacher).exists() else Distillation()


def distillation(real: Distillation, teacher: Path) -> Distillation:
    """Return the flags with a small teacher. Stored log-probabilities are of the real rows, which are cut: they are left out."""
    return Distillation() if real.teacher is None else replace(real, teacher=str(teacher))


def checkpointing(real: Checkpointing, load: Path, save: Path) -> Checkpointing:
    return replace(
        real, load=str(load), save=str(save) if real.save else None, auto_resume=False,
        save_interval=SAVE_AT if real.save and real.save_interval else None,
    )  # fmt: skip


def logging(real: Logging, folder: Path) -> Logging:
    return replace(
        real, log_interval=1, eval_interval=SAVE_AT if real.eval_interval else None, eval_iters=1, report=False,
        sample_prompts=None, sample_interval=None, sample_chats=0,
        run_dir=str(folder / "run") if real.run_dir else None,
        tensorboard_dir=str(folder / "tensorboard") if real.tensorboard_dir else None,
    )  # fmt: skip


def model(real: Model) -> Model:
    """Return only the RoPE scaling; the other flags have been compared with the real model."""
    if real.use_rope_scaling:
        return Model()  # Llama 3's scaling is the model's own
    return Model(rope_scaling_type=real.rope_scaling_type, rope_scaling_factor=real.rope_scaling_factor)


def launching(real: Launching, processes: int | None, folder: Path) -> Launching:
    """Return the launch settings. processes: to start on this machine only; None: as many machines as the real run."""
    machine = {"nnodes": 1, "node_rank": 0, "master_addr": None, "master_port": None}
    alone: dict[str, Any] = {"nproc_per_node": processes, **machine}
    logs = str(folder / "logs") if real.log_dir else None
    return replace(real, rehearse=False, log_dir=logs, **(alone if processes else {}))


def stopping(real: Stopping) -> Stopping:
    return Stopping(exit_before_end_in_mins=0.0)


def changes(arch: Architecture, small: Architecture, real: Any, now: Any, processes: tuple[int, int]) -> list[Change]:
    """Return the changes to print. real, now: settings before and after. processes: number before and after."""
    pairs = [
        ("layers", arch.num_layers, small.num_layers), ("hidden", arch.hidden_size, small.hidden_size),
        ("heads", arch.num_attention_heads, small.num_attention_heads), ("MLP", arch.ffn_hidden_size, small.ffn_hidden_size),
        ("row", real.data.seq_length, now.data.seq_length), ("microbatch", real.batch.micro_batch_size, now.batch.micro_batch_size),
        ("global batch", real.batch.global_batch_size, now.batch.global_batch_size),
        ("context parallel", real.parallel.context_parallel_size, now.parallel.context_parallel_size),
        ("steps", real.batch.train_iters or f"of {real.batch.epochs:g} epochs", now.batch.train_iters), ("processes", *processes),
    ]  # fmt: skip
    return [Change(what, before, after) for what, before, after in pairs if before != after]
