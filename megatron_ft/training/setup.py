"""Builds the model to train from the settings: this rank's part, in the engine's wrappers."""

from __future__ import annotations

import copy
import dataclasses
from typing import Any

import torch
from megatron.core.distributed import DistributedDataParallel, DistributedDataParallelConfig
from megatron.core.transformer.module import Float16Module

from megatron_ft.adapters.lora import attach
from megatron_ft.adapters.spec import TRAINED, Lora
from megatron_ft.checkpoints.folder import vocab_rows
from megatron_ft.checkpoints.quantised import nf4_of
from megatron_ft.config.sections import Data, Kernels, Numerics, Parallelism
from megatron_ft.engine.parallel import Layout
from megatron_ft.models.architecture import Architecture, refuse_experts
from megatron_ft.models.build import BuildOptions, attention_needs, build_chunks
from megatron_ft.models.kernels import choose, machine
from megatron_ft.models.pair import Pair
from megatron_ft.models.pipeline import split_layers
from megatron_ft.models.trainable import ALL, Trainable
from megatron_ft.training.teacher import Teacher


def make_model(
    arch: Architecture, layout: Layout, data: Data, parallel: Parallelism, numerics: Numerics,
    kernels: Kernels | None = None, rows: int | None = None, trainable: Trainable = ALL, lora: Lora | None = None,
    nf4: torch.dtype | None = None, teacher: Teacher | None = None,
) -> list[DistributedDataParallel]:  # fmt: skip
    """Return the chunks of this rank's stage (one, unless the pipeline is interleaved), each in the engine's data-parallel wrapper
    (gradients in fp32 buffers, unless --grad_reduce_in_bf16).

    rows: of the embedding with padding, if a checkpoint defines them. trainable: the parameters to train; the others get no gradients.
    lora: adapters to add; then only they are trained. nf4: as BuildOptions'. teacher: the frozen model beside it, whose weights are
    loaded later (models/pair.py).
    """
    refuse_experts(arch)
    kernels, here = kernels or Kernels(), machine()
    whole_layers = numerics.recompute_granularity == "full"
    options = BuildOptions(
        dtype=dtype_of(numerics),
        hidden_dropout=numerics.hidden_dropout,
        attention_dropout=numerics.attention_dropout,
        lima_dropout=numerics.lima_dropout,
        recompute_granularity=numerics.recompute_granularity,
        recompute_method=(numerics.recompute_method or "uniform") if whole_layers else None,
        recompute_num_layers=(numerics.recompute_num_layers or 1) if whole_layers else None,
        recompute_modules=tuple(numerics.recompute_modules),
        max_sequence_length=data.seq_length,
        padded_vocab_size=rows,
        variable_seq_lengths=data.variable_seq_lengths,
        # With gloo, simultaneous exchanges receive each other's messages, and the numbers are wrong.
        overlap_p2p=kernels.overlap_p2p_communication and here.has_gpu,
        kernels=choose(kernels, numerics, here, attention_needs(arch)),
        split=split_layers(arch.num_layers, parallel),
        nf4=nf4,
    )
    ddp = DistributedDataParallelConfig(
        grad_reduce_in_fp32=not numerics.grad_reduce_in_bf16,
        use_distributed_optimizer=parallel.use_distributed_optimizer,
        overlap_grad_reduce=kernels.overlap_grad_reduce,
        overlap_param_gather=kernels.overlap_param_gather,
    )
    chunks = build_chunks(arch, layout, options)
    config = chunks[0].config
    if lora:
        attach(chunks, arch, lora)
        trainable = TRAINED
    for chunk in chunks:
        trainable.freeze_others(chunk)
    if teacher:
        own = choose(kernels, numerics, here, attention_needs(teacher.described.architecture))
        chunks = _pairs(
            chunks, teacher, layout, dataclasses.replace(options, kernels=dataclasses.replace(own, accumulates=False))
        )
        config = chunks[0].config
    wrapped = [
        # Gradients of later chunks come first in the backward pass: only there buckets are useful.
        DistributedDataParallel(
            config,
            ddp,
            Float16Module(config, chunk) if numerics.bf16 or numerics.fp16 else chunk,
            disable_bucketing=number > 0,
        )
        for number, chunk in enumerate(chunks)
    ]
    if kernels.overlap_grad_reduce:  # gradients of earlier microbatches of the step stay here
        no_sync = [chunk.no_sync for chunk in wrapped]
        config.no_sync_func = no_sync if len(wrapped) > 1 else no_sync[0]
    return wrapped


def _pairs(chunks: list, teacher: Teacher, layout: Layout, options: BuildOptions) -> list:
    """Return every chunk with that of the teacher, which has neither dropout nor recomputation."""
    plain = dataclasses.replace(
        options, hidden_dropout=0.0, attention_dropout=0.0, lima_dropout=False, recompute_granularity=None,
        recompute_method=None, recompute_num_layers=None, recompute_modules=(), split=teacher.split,
        padded_vocab_size=vocab_rows(teacher.described), nf4=nf4_of(teacher.described),
    )  # fmt: skip
    theirs = build_chunks(teacher.described.architecture, layout, plain)
    config = copy.copy(chunks[0].config)
    config.hidden_size += theirs[0].config.hidden_size
    return [Pair(chunk, of.to(options.dtype), config) for chunk, of in zip(chunks, theirs, strict=True)]


def teachers(chunks: list) -> list:
    """Return the teacher's chunks; [] without one."""
    return [pair.teacher for pair in map(_pair, chunks) if pair is not None]


def _pair(model: Any) -> Pair | None:
    while not isinstance(model, Pair) and hasattr(model, "module"):
        model = model.module
    return model if isinstance(model, Pair) else None


def dtype_of(numerics: Numerics) -> torch.dtype:
    """Return the type of weights and activations."""
    return torch.bfloat16 if numerics.bf16 else torch.float16 if numerics.fp16 else torch.float32


def bare(chunks: list) -> list:
    """Return the GPTModels inside their wrappers."""
    return [_inside(chunk) for chunk in chunks]


def _inside(model: Any) -> Any:
    while hasattr(model, "module"):
        model = model.module
    return model
