"""Rules between settings, checked before anything is built: one function per rule, without torch.

Each raises ConfigError with both values and the remedy. `check_settings` runs those that need no model; training/fit.py runs the others.
"""

from __future__ import annotations

import math

from megatron_ft.config.schedule import rates_in_order, warmup_fits, warmup_given_once, weight_decay_rises, wsd_fits
from megatron_ft.config.sections import (
    Batch,
    Checkpointing,
    Data,
    Distillation,
    Kernels,
    Logging,
    Numerics,
    Parallelism,
)
from megatron_ft.config.settings import TrainingSettings
from megatron_ft.config.steps import one_length
from megatron_ft.errors import ConfigError
from megatron_ft.wording import counted


def positive(section: object, *names: str) -> None:
    for name in names:
        value = getattr(section, name)
        if value is not None and value < 1:
            raise ConfigError(f"--{name} {value}: must be at least 1")


def share(section: object, *names: str) -> None:
    for name in names:
        value = getattr(section, name)
        if not 0 <= value < 1:
            raise ConfigError(f"--{name} {value}: must be at least 0 and less than 1")


def not_negative(section: object, *names: str) -> None:
    for name in names:
        value = getattr(section, name)
        if value is not None and not 0 <= value < math.inf:
            raise ConfigError(f"--{name} {value}: must be 0 or more")


def world_fits_layout(parallel: Parallelism, world_size: int) -> None:
    tp, pp, cp = parallel.model_parallel_sizes
    replica = parallel.model_parallel_size
    if world_size % replica:
        context = f" x context_parallel_size {cp}" if cp > 1 else ""
        raise ConfigError(
            f"{counted(world_size, 'process')} cannot hold tensor_model_parallel_size {tp} x pipeline_model_parallel_size {pp}{context} = "
            f"{replica}: start a multiple of {replica}: --nproc_per_node {replica}"
        )


def data_parallel_size(parallel: Parallelism, world_size: int) -> int:
    return world_size // parallel.model_parallel_size


def context_fits(parallel: Parallelism, data: Data) -> None:
    """Check the rows. models/kernels.py checks the machine."""
    cp = parallel.context_parallel_size
    unit = 2 * cp * (parallel.tensor_model_parallel_size if parallel.sequence_parallel else 1)
    if cp > 1 and (data.packing or data.variable_seq_lengths):
        raise ConfigError(
            f"--context_parallel_size {cp} cuts rows of one sample and one length: add --no_packing, drop --variable_seq_lengths"
        )
    if cp > 1 and data.seq_length % unit:
        raise ConfigError(
            f"--context_parallel_size {cp} needs --seq_length {data.seq_length} to be a multiple of {unit}: "
            f"use --seq_length {data.seq_length // unit * unit or unit}"
        )


def batch_fits(batch: Batch, dp_size: int) -> None:
    unit = batch.micro_batch_size * dp_size
    if batch.global_batch_size is not None and batch.global_batch_size % unit:
        below = batch.global_batch_size // unit * unit
        nearest = " or ".join(str(size) for size in (below, below + unit) if size)
        raise ConfigError(
            f"--global_batch_size {batch.global_batch_size} is not a multiple of --micro_batch_size {batch.micro_batch_size} x "
            f"data-parallel size {dp_size} = {unit}: use --global_batch_size {nearest}, or a smaller --micro_batch_size"
        )


def one_way_to_split(parallel: Parallelism) -> None:
    """Check that only one flag divides the layers over stages. models/pipeline.py checks that it fits the model."""
    chunks = ("num_layers_per_virtual_pipeline_stage", "virtual_pipeline_model_parallel_size")
    ends = ("decoder_first_pipeline_num_layers", "decoder_last_pipeline_num_layers")
    written = "pipeline_model_parallel_layout"
    given = [name for name in (*chunks, *ends, written) if getattr(parallel, name)]
    if given and parallel.pipeline_model_parallel_size == 1:
        raise ConfigError(f"--{given[0]} without a pipeline: set --pipeline_model_parallel_size above 1, or drop it")
    for clash in (chunks, *((written, name) for name in (*chunks, *ends))):
        if set(clash) <= set(given):
            raise ConfigError(f"--{clash[0]} and --{clash[1]} both define how layers are divided: give one of them")


def microbatches_fit_chunks(
    parallel: Parallelism, batch: Batch, data: Data, dp_size: int, virtual_size: int
) -> None:  # fmt: skip
    """Check microbatches for the interleaved schedule: it needs groups of as many as there are stages, all of one shape.

    dp_size: 0 if the processes hold no complete replica, which world_fits_layout refuses.
    """
    if virtual_size == 1 or dp_size == 0:
        return
    if data.variable_seq_lengths:
        raise ConfigError(
            "--variable_seq_lengths does not go with interleaved stages, which exchange rows of one length: drop one of the two"
        )
    rows = batch.global_batch_size or batch.micro_batch_size * dp_size
    count, stages = rows // (batch.micro_batch_size * dp_size), parallel.pipeline_model_parallel_size
    if count % stages:
        unit = batch.micro_batch_size * dp_size * stages
        raise ConfigError(
            f"interleaved stages need a multiple of --pipeline_model_parallel_size {stages} microbatches a step; --global_batch_size "
            f"{rows} makes {count}: use --global_batch_size {max(unit, round(rows / unit) * unit)}"
        )


def sequence_parallel_fits(parallel: Parallelism, batch: Batch, data: Data) -> None:
    tp = parallel.tensor_model_parallel_size
    if parallel.sequence_parallel and data.seq_length % tp:
        raise ConfigError(
            f"--sequence_parallel needs --seq_length {data.seq_length} to be a multiple of --tensor_model_parallel_size {tp}: "
            f"use --seq_length {data.seq_length // tp * tp}"
        )


def rows_fit_positions(data: Data, positions: int) -> None:
    """Check the row length. positions: of the model, with RoPE scaling by flags."""
    if data.seq_length > positions:
        raise ConfigError(
            f"--seq_length {data.seq_length} is beyond the model's {positions} positions: lower it, or scale the rope with "
            f"--rope_scaling_factor"
        )


def shares_fit(data: Data) -> None:
    if data.data_weights and len(data.data_weights) != len(data.data_path):
        raise ConfigError(
            f"--data_weights has {counted(len(data.data_weights), 'share')} for {len(data.data_path)} --data_path: give one for each"
        )
    if any(share < 0 for share in data.data_weights) or (data.data_weights and not any(data.data_weights)):
        raise ConfigError(f"--data_weights {data.data_weights}: shares must not be negative, and not all 0")


def shares_of_split(data: Data) -> tuple[float, float, float] | None:
    """Return --split as three shares. Raise ConfigError for other text."""
    if data.split is None:
        return None
    parts = data.split.replace("/", ",").split(",")
    try:
        shares = [float(part) for part in parts] + [0.0] * (3 - len(parts))
    except ValueError:
        shares = []
    if len(shares) != 3 or not all(0 <= share < math.inf for share in shares) or not shares[0]:
        raise ConfigError(
            f"--split {data.split}: write shares to train on, to validate on and to leave out, as in 969,30,1"
        )
    if data.valid_data_path:
        raise ConfigError(f"--split {data.split} and --valid_data_path both define the validation set: keep one")
    return shares[0], shares[1], shares[2]


def role_weights(data: Data) -> dict[str, float]:
    """Return --role_loss_weights as a mapping. Raise ConfigError for an entry that is not name=number."""
    found = {}
    for entry in data.role_loss_weights:
        name, _, number = entry.partition("=")
        try:
            found[name] = float(number)
        except ValueError:
            raise ConfigError(f"--role_loss_weights {entry}: write name=number, as in user=0.1") from None
    return found


def variable_rows_fit(data: Data, parallel: Parallelism) -> None:
    if data.variable_seq_lengths and data.packing:
        raise ConfigError(
            "--variable_seq_lengths is for one sample a row: add --no_packing, or drop it (packed rows are full)"
        )
    if data.variable_seq_lengths and parallel.sequence_parallel and 16 % parallel.tensor_model_parallel_size:
        raise ConfigError(
            f"--variable_seq_lengths rounds rows to 16 positions, which --tensor_model_parallel_size "
            f"{parallel.tensor_model_parallel_size} does not divide: drop --sequence_parallel or --variable_seq_lengths"
        )


def lima_has_dropout(numerics: Numerics) -> None:
    if numerics.lima_dropout and numerics.hidden_dropout == 0:
        raise ConfigError(
            "--lima_dropout has no effect with --hidden_dropout 0: set --hidden_dropout (the paper used 0.3)"
        )


def one_precision(numerics: Numerics) -> None:
    if numerics.bf16 and numerics.fp16:
        raise ConfigError("--bf16 and --fp16 are both set: give one of them")
    if numerics.grad_reduce_in_bf16 and not numerics.bf16:
        raise ConfigError("--grad_reduce_in_bf16 is for --bf16: add it, or drop --grad_reduce_in_bf16")
    if numerics.loss_scale is not None and not numerics.fp16:
        raise ConfigError(f"--loss_scale {numerics.loss_scale:g} is for --fp16: add it, or drop --loss_scale")
    if numerics.loss_scale is not None and not 0 < numerics.loss_scale < math.inf:
        raise ConfigError(f"--loss_scale {numerics.loss_scale:g}: must be above 0")
    if not 0 < numerics.min_loss_scale <= numerics.initial_loss_scale < math.inf:
        raise ConfigError(
            f"--min_loss_scale {numerics.min_loss_scale:g} must be above 0 and at most --initial_loss_scale "
            f"{numerics.initial_loss_scale:g}"
        )


def recompute_is_consistent(numerics: Numerics) -> None:
    granularity = numerics.recompute_granularity
    needs = {"recompute_modules": "selective", "recompute_method": "full", "recompute_num_layers": "full"}
    for name, wanted in needs.items():
        if getattr(numerics, name) and granularity != wanted:
            raise ConfigError(
                f"--{name} is for --recompute_granularity {wanted}, which is {granularity or 'not set'}: set it, or drop --{name}"
            )


def recompute_groups_fit(numerics: Numerics, layers_of_chunks: list[int]) -> None:
    """Check --recompute_num_layers. layers_of_chunks: number of layers of each chunk of each stage."""
    each = numerics.recompute_num_layers or 1
    if numerics.recompute_granularity == "full" and numerics.recompute_method != "block":
        for layers in layers_of_chunks:
            if layers % each:
                raise ConfigError(
                    f"--recompute_num_layers {each} does not divide the {counted(layers, 'layer')} of a stage: use one that does, or "
                    f"--recompute_method block"
                )


def overlaps_have_a_subject(kernels: Kernels, parallel: Parallelism) -> None:
    if kernels.overlap_param_gather and not parallel.use_distributed_optimizer:
        raise ConfigError(
            "--overlap_param_gather is for --use_distributed_optimizer: add it, or drop --overlap_param_gather"
        )
    if kernels.overlap_param_gather and not kernels.overlap_grad_reduce:
        raise ConfigError("--overlap_param_gather needs --overlap_grad_reduce: add it")
    interleaved = parallel.num_layers_per_virtual_pipeline_stage or parallel.virtual_pipeline_model_parallel_size
    if kernels.overlap_p2p_communication and not (interleaved or parallel.pipeline_model_parallel_layout):
        raise ConfigError(
            "--overlap_p2p_communication is for interleaved stages: set --num_layers_per_virtual_pipeline_stage, or drop it"
        )


def saving_has_a_place(checkpointing: Checkpointing) -> None:
    for name in ("save_interval", "keep_last", "save_retain_interval", "async_save", "auto_resume"):
        value = getattr(checkpointing, name)
        if value and checkpointing.save is None:
            flag = f"--{name}" if value is True else f"--{name} {value}"
            raise ConfigError(f"{flag} without --save: set --save to the folder for checkpoints")


def milestones_have_a_use(checkpointing: Checkpointing) -> None:
    if checkpointing.save_retain_interval and not checkpointing.keep_last:
        raise ConfigError(
            f"--save_retain_interval {checkpointing.save_retain_interval} without --keep_last: all checkpoints are kept anyway; "
            f"set --keep_last to the number of others to keep, or drop it"
        )


def classic_saves_fit(checkpointing: Checkpointing, plain: bool) -> None:
    """Check --ckpt_format torch. plain: whether each stage holds one chunk, all of one size."""
    if checkpointing.save and checkpointing.ckpt_format == "torch" and not plain:
        raise ConfigError(
            "--ckpt_format torch knows one equal part of the model a stage, this run's stages are interleaved or uneven: "
            "save with --ckpt_format torch_dist"
        )


def classic_saves_know_no_context_parallel(checkpointing: Checkpointing, parallel: Parallelism) -> None:
    if checkpointing.save and checkpointing.ckpt_format == "torch" and parallel.context_parallel_size > 1:
        raise ConfigError(
            f"--ckpt_format torch has one file a tensor- and pipeline-parallel rank, and --context_parallel_size "
            f"{parallel.context_parallel_size} gives each several processes: save with --ckpt_format torch_dist"
        )


def samples_have_prompts(logging: Logging, parallel: Parallelism) -> None:
    if logging.sample_interval is not None and not logging.sample_prompts and not logging.sample_chats:
        raise ConfigError(
            f"--sample_interval {logging.sample_interval} has no effect: --sample_chats is 0 and there are no --sample_prompts"
        )
    if logging.sample_prompts and parallel.context_parallel_size > 1:
        raise ConfigError(
            f"--sample_prompts cannot answer with --context_parallel_size {parallel.context_parallel_size}, which shares the positions "
            f"of a row: leave it out, and ask the checkpoints with megatron-ft generate"
        )


def teacher_has_a_use(distillation: Distillation) -> None:
    one = distillation
    if one.teacher is not None and one.teacher_logits:
        raise ConfigError("--teacher and --teacher_logits both give the teacher's distribution: drop one of them")
    for name, default in (("kd_weight", 1.0), ("ce_weight", 1.0), ("kd_temperature", 1.0)):
        if getattr(one, name) != default and not one.has_teacher:
            raise ConfigError(
                f"--{name} {getattr(one, name):g} has no effect without a teacher: give --teacher or --teacher_logits, or drop it"
            )
    if not (0 < one.kd_temperature < math.inf):
        raise ConfigError(f"--kd_temperature {one.kd_temperature:g}: must be above 0")
    if one.kd_weight == 0 and one.has_teacher:
        raise ConfigError("--kd_weight 0 gives the teacher no effect: raise it, or drop the teacher")


def places_to_write(settings: TrainingSettings) -> dict[str, str]:
    """Return flag -> folder that a run will write to."""
    logging = settings.logging
    named = {
        "--save": settings.checkpointing.save, "--tensorboard_dir": logging.tensorboard_dir, "--run_dir": logging.run_dir,
        "--log_dir": settings.launching.log_dir,
    }  # fmt: skip
    return {flag: place for flag, place in named.items() if place}


def check_settings(settings: TrainingSettings, world_size: int) -> None:
    """Check every rule above that needs no model, in the order in which a user would want to hear of them.

    Raise ConfigError. world_size: processes of the run, over all machines.
    """
    s, data, batch, parallel, numerics = settings, settings.data, settings.batch, settings.parallel, settings.numerics
    checkpointing, optimizer = s.checkpointing, s.optimizer
    positive(
        parallel, "tensor_model_parallel_size", "pipeline_model_parallel_size", "num_layers_per_virtual_pipeline_stage",
        "context_parallel_size", "virtual_pipeline_model_parallel_size", "decoder_first_pipeline_num_layers",
        "decoder_last_pipeline_num_layers",
    )  # fmt: skip
    positive(batch, "micro_batch_size", "global_batch_size", "max_skipped_iters")
    one_length(batch)
    positive(data, "seq_length")
    positive(s.logging, "log_interval", "eval_interval", "sample_interval", "sample_max_new_tokens")
    not_negative(s.logging, "eval_iters", "sample_chats")
    positive(checkpointing, "save_interval", "keep_last", "save_retain_interval")
    positive(optimizer, "lr_decay_iters", "lr_wsd_decay_iters")
    positive(numerics, "recompute_num_layers", "loss_scale_window", "hysteresis", "check_replicas_every")
    not_negative(data, "seed")
    not_negative(
        optimizer, "min_lr", "lr_warmup_iters", "lr_warmup_init", "weight_decay", "start_weight_decay", "end_weight_decay", "adam_eps",
        "clip_grad",
    )  # fmt: skip
    share(optimizer, "adam_beta1", "adam_beta2")
    share(numerics, "hidden_dropout", "attention_dropout")
    one_way_to_split(parallel)
    world_fits_layout(parallel, world_size)
    batch_fits(batch, data_parallel_size(parallel, world_size))
    sequence_parallel_fits(parallel, batch, data)
    context_fits(parallel, data)
    shares_fit(data)
    shares_of_split(data)
    role_weights(data)
    variable_rows_fit(data, parallel)
    rates_in_order(optimizer)
    warmup_given_once(optimizer)
    warmup_fits(optimizer, batch)
    wsd_fits(optimizer, batch)
    weight_decay_rises(optimizer)
    lima_has_dropout(numerics)
    one_precision(numerics)
    recompute_is_consistent(numerics)
    saving_has_a_place(checkpointing)
    milestones_have_a_use(checkpointing)
    classic_saves_know_no_context_parallel(checkpointing, parallel)
    samples_have_prompts(s.logging, parallel)
    not_negative(s.distillation, "kd_weight", "ce_weight")
    teacher_has_a_use(s.distillation)
    overlaps_have_a_subject(s.kernels, parallel)
