"""megatron-ft plan: estimate memory per stage, idle time, step time and checkpoint size of a layout without a GPU; propose better ones."""

from __future__ import annotations

import json
import sys
from dataclasses import asdict, dataclass, field
from typing import TYPE_CHECKING, Any, Literal

from megatron_ft.config.checks import (
    context_fits,
    microbatches_fit_chunks,
    one_way_to_split,
    positive,
    recompute_groups_fit,
    recompute_is_consistent,
    sequence_parallel_fits,
)
from megatron_ft.config.cli import Command, run_script
from megatron_ft.config.sections import Batch, Data, Numerics, Parallelism
from megatron_ft.errors import ConfigError

if TYPE_CHECKING:
    from megatron_ft.adapters.spec import Lora
    from megatron_ft.models.architecture import Architecture
    from megatron_ft.models.pipeline import PipelineSplit
    from megatron_ft.planner.memory import Job
    from megatron_ft.planner.search import Proposal


@dataclass
class Plan:
    """Model, hardware and batch"""

    model: str = field(default="", metadata={"required": True})
    """model: a name (llama2-70b, falcon-40b, ...), a Hugging Face config.json, or a checkpoint"""
    gpus: int | None = None
    """total number of GPUs, one process each; without sizes of a layout the fastest that fits is chosen; default: tensor x pipeline x
    context parallel size"""
    gpu: str = "a100-80gb"
    """type of GPU, which determines memory, speed and interconnect; cpu: this machine's memory"""
    gpu_memory_gb: float | None = None
    """memory per GPU in GB (1e9 bytes); default: that of the type in --gpu"""
    gpus_per_node: int = 8
    """number of GPUs per node, which are connected by fast links"""
    seq_length: int | None = None
    """tokens per row; default: the model's context length, at most 4096"""
    micro_batch_size: int = 1
    """rows that one process computes at once"""
    global_batch_size: int = 64
    """rows per optimizer step, over all processes"""
    recompute_granularity: Literal["none", "selective", "full"] = "none"
    """recompute activations in the backward pass to save memory: parts of each layer (selective) or whole layers (full)"""
    recompute_modules: list[Literal["core_attn", "mlp", "layernorm"]] = field(default_factory=list)
    """parts of a layer that --recompute_granularity selective recomputes; default: core_attn"""
    recompute_method: Literal["uniform", "block"] | None = None
    """with --recompute_granularity full: all layers, in groups (uniform, the default), or only the first layers of each stage (block)"""
    recompute_num_layers: int | None = None
    """with --recompute_granularity full: layers per group (uniform), or recomputed layers per stage (block); default: 1"""
    fp32: bool = False
    """compute in fp32 instead of bf16"""
    base_precision: Literal["nf4"] | None = None
    """the model is the frozen base of adapters, and its linears are in 4 bits (nf4); --lora_rank counts the adapters"""
    hidden_dropout: float = 0.0
    """dropout probability on the residual stream; above 0, its masks need memory if kernels are not fused"""
    lora_rank: int | None = None
    """plan for LoRA adapters of this rank on a frozen model; default: the model itself is trained"""
    lora_target: list[str] = field(default_factory=list)
    """with --lora_rank: parts of a layer with adapters (qkv, proj, fc1, fc2) or names of modules, separated by commas; default: all"""
    lora_dropout: float = 0.0
    """with --lora_rank: dropout probability on the adapters' input; above 0, it keeps a copy of that"""
    train_new_tokens: int = 0
    """with --lora_rank: number of added tokens whose rows of the embedding and the output layer are trained too"""
    teacher: str | None = None
    """teacher of a distillation, in memory beside the model: a name, a config.json or a checkpoint, as for the model; default: none"""
    train_iters: int | None = None
    """number of optimizer steps, to estimate the duration of the run; default: no estimate"""
    proposals: int = 5
    """largest number of better layouts to show"""
    json: bool = False
    """print the plan as JSON"""


COMMAND = Command(
    name="plan",
    summary="memory per stage, pipeline bubble, checkpoint size, better layouts",
    sections=(Plan, Parallelism),
    examples=(
        "megatron-ft plan llama3.1-405b --gpus 2048 --gpu h100 --global_batch_size 2048",
        "megatron-ft plan llama2-70b --gpus 32 --tensor_model_parallel_size 8 --pipeline_model_parallel_size 4 --sequence_parallel",
        "megatron-ft plan falcon-40b/config.json --gpus 128 --gpu a100-40gb --tensor_model_parallel_size 8 "
        "--pipeline_model_parallel_size 2 --use_distributed_optimizer --json",
    ),
    positional=("model",),
    common=(
        "model: a name such as llama2-7b, or a config.json",
        "gpus",
        "gpu: type of GPU",
        "gpu_memory_gb",
        "gpus_per_node",
        "seq_length",
        "micro_batch_size: rows that a process computes at once",
        "global_batch_size: rows per optimizer step",
        "recompute_granularity: save memory: selective or full",
        "lora_rank",
        "base_precision: of a frozen model",
        "proposals",
        "json",
        "tensor_model_parallel_size: parts of each weight matrix (TP)",
        "pipeline_model_parallel_size: stages of the layers (PP)",
        "virtual_pipeline_model_parallel_size: chunks of layers per stage",
        "sequence_parallel: with TP: less memory for activations",
        "use_distributed_optimizer: split the optimizer state (ZeRO-1)",
    ),
)


def run(plan: Plan, parallel: Parallelism) -> int:
    """Print the plan. Return 0 also if the model does not fit."""
    from megatron_ft.planner import known

    arch, kind = known.architecture(plan.model), known.gpu(plan.gpu)
    job = _job(arch, plan, parallel)
    shared = job.gpus if known.gpu_name(plan.gpu) == known.CPU else 1  # processes share the machine's memory
    limit = (plan.gpu_memory_gb or kind.memory / shared) * 1e9
    found = _found(plan, arch, _chosen(arch, job, plan, limit) if _is_open(plan, parallel) else job, limit)
    found["chosen"] = _is_open(plan, parallel)
    if plan.json:
        print(json.dumps(found, indent=2))
        return 0
    from megatron_ft.planner.page import show

    show(found, kind)
    return 0


def _found(plan: Plan, arch: Architecture, job: Job, limit: float) -> dict[str, Any]:
    """Return the content of the JSON output."""
    from megatron_ft.planner import figures, known, memory, search

    kind, is_gpu = known.gpu(plan.gpu), known.gpu_name(plan.gpu) != known.CPU
    proposals = search.proposals(arch, job, kind, limit, plan.gpus_per_node)
    return {
        "model": plan.model,
        **({"teacher": {"model": plan.teacher, "parameters": figures.whole_model(job.teacher)}} if job.teacher else {}),
        "parameters": figures.whole_model(arch),
        **({"adapters": {"rank": job.lora.rank, "parameters": job.lora.parameters(arch)}} if job.lora else {}),
        "gpus": job.gpus,
        "layout": {"tp": job.tp, "pp": job.pp, "cp": job.cp, "dp": job.dp, "chunks_a_stage": job.split.virtual_size},
        "flags": search.flags(job),
        "recompute": search.recompute_words(job),
        "seq_length": job.seq_length,
        "micro_batch_size": job.micro_batch,
        "global_batch_size": job.global_batch,
        "microbatches": job.microbatches,
        "gpu": {"kind": known.gpu_name(plan.gpu), "memory_bytes": limit},
        "stages": [{**asdict(stage), "total": stage.total} for stage in memory.stages(arch, job)],
        "reserve_bytes": memory.RESERVE,
        "activations_by_recompute": _by_recompute(arch, job),
        "fits_with": _fits_with(arch, job, limit),
        "optimizer_distributed": memory.optimizer_bytes(1_000_000, _with(job, distributed_optimizer=True)) / 1_000_000,
        "bubble": figures.bubble(job),
        "tokens_per_step": job.global_batch * job.seq_length,
        "seconds_per_step": asdict(figures.step_time(arch, job, kind, plan.gpus_per_node)) if is_gpu else None,
        "checkpoint": {**asdict(saved := figures.checkpoint(arch, job)), "bytes": saved.bytes},
        "base": {
            "nf4": figures.nf4_on_disk(arch, job, False), "nf4_double_quant": figures.nf4_on_disk(arch, job, True),
        } if job.nf4 else None,
        "host_memory_at_a_save": memory.host_memory(arch, job, plan.gpus_per_node),
        "train_iters": plan.train_iters,
        "proposals": [_proposal(one, is_gpu) for one in proposals[: plan.proposals]],
        "remedies": [] if proposals else _remedies(arch, job, plan, limit),
    }  # fmt: skip


def _proposal(one: Proposal, is_gpu: bool) -> dict[str, Any]:
    from megatron_ft.planner import figures, search

    job = one.job
    return {
        "flags": search.flags(job), "seconds": one.seconds if is_gpu else None, "memory": one.memory,
        "tp": job.tp, "pp": job.pp, "cp": job.cp, "dp": job.dp, "chunks": job.split.virtual_size,
        "micro_batch": job.micro_batch, "recompute": search.recompute_words(job), "bubble": figures.bubble(job),
    }  # fmt: skip


def _is_open(plan: Plan, parallel: Parallelism) -> bool:
    """Return whether the layout is to be chosen: several GPUs, and nothing about it given."""
    return (plan.gpus or 1) > 1 and parallel == Parallelism()


def _chosen(arch: Architecture, job: Job, plan: Plan, limit: float) -> Job:
    """Return the fastest layout that fits with the given recomputation and microbatch, else the one that needs least memory."""
    from megatron_ft.planner import known, search

    kind, node = known.gpu(plan.gpu), plan.gpus_per_node
    if job.recompute != "none" or plan.micro_batch_size > 1:
        one = search.given(
            arch, job, kind, limit, node, plan.micro_batch_size if plan.micro_batch_size > 1 else None
        )  # fmt: skip
    elif found := search.proposals(arch, job, kind, limit, node):
        one = found[0].job
    else:
        least = search.least_memory(arch, job, node)
        one = least and least[1]
    if one is None:
        _check_batch(plan, 1)
        raise ConfigError(
            f"--gpus {job.gpus}: no layout of so many divides the model's heads and layers and --global_batch_size "
            f"{job.global_batch}: use another number of GPUs, or a batch that is a multiple of it"
        )
    return one


def _fits_with(arch: Architecture, job: Job, limit: float) -> dict[str, Any] | None:
    """Return the recomputation that makes this layout fit, the fastest first; None: it fits, or nothing does."""
    from megatron_ft.planner import figures, memory, search

    if memory.most_memory(arch, job) <= limit:
        return None
    plain = _with(job, recompute="none")
    found = sorted(search.recomputations(arch, plain, limit), key=lambda one: figures.flops(arch, one))
    if not found:
        return None
    return {"flags": search.recompute_flags(found[0]), "memory": memory.most_memory(arch, found[0])}


def _remedies(arch: Architecture, job: Job, plan: Plan, limit: float) -> list[dict[str, Any]]:
    from megatron_ft.planner import known
    from megatron_ft.planner.remedies import remedies

    is_gpu = known.gpu_name(plan.gpu) != known.CPU
    found = remedies(
        arch, job, limit, plan.gpus_per_node, more=is_gpu, other=is_gpu and plan.gpu_memory_gb is None
    )  # fmt: skip
    return [asdict(one) for one in found]


def _job(arch: Architecture, plan: Plan, parallel: Parallelism) -> Job:
    from megatron_ft.models.architecture import check_layout
    from megatron_ft.models.families import family_of
    from megatron_ft.models.pipeline import split_layers
    from megatron_ft.models.quantised import check_blocks
    from megatron_ft.planner.memory import Job

    positive(
        plan, "gpus", "gpus_per_node", "seq_length", "micro_batch_size", "global_batch_size", "train_iters",
        "recompute_num_layers",
    )  # fmt: skip
    one_way_to_split(parallel)
    check_layout(arch, parallel.tensor_model_parallel_size)
    if plan.base_precision:
        check_blocks(arch, family_of(arch).rules(arch), parallel.tensor_model_parallel_size)
    split = split_layers(arch.num_layers, parallel)
    seq_length = plan.seq_length or min(4096, arch.max_position_embeddings)
    data = Data(seq_length=seq_length, packing=False)
    context_fits(parallel, data)
    sequence_parallel_fits(parallel, Batch(), data)
    model_gpus = parallel.model_parallel_size
    gpus = plan.gpus or model_gpus
    if gpus % model_gpus:
        context = " x context" if parallel.context_parallel_size > 1 else ""
        raise ConfigError(
            f"--gpus {gpus} is not a multiple of tensor x pipeline{context} parallel size = {model_gpus}: change one"
        )
    dp = gpus // model_gpus
    if not _is_open(plan, parallel):
        _check_batch(plan, dp)
        batch = Batch(micro_batch_size=plan.micro_batch_size, global_batch_size=plan.global_batch_size)
        microbatches_fit_chunks(parallel, batch, data, dp, split.virtual_size)
    return Job(
        split, parallel.tensor_model_parallel_size, dp, seq_length,
        plan.micro_batch_size, plan.global_batch_size,
        sequence_parallel=parallel.sequence_parallel and parallel.tensor_model_parallel_size > 1,
        distributed_optimizer=parallel.use_distributed_optimizer, **_recomputation(plan, split),
        bf16=not plan.fp32, dropout=plan.hidden_dropout > 0, cp=parallel.context_parallel_size, lora=_lora(arch, plan),
        nf4=plan.base_precision == "nf4", teacher=_teacher(arch, plan, parallel, split),
    )  # fmt: skip


def _check_batch(plan: Plan, dp: int) -> None:
    unit = plan.micro_batch_size * dp
    if plan.global_batch_size % unit:
        raise ConfigError(
            f"--global_batch_size {plan.global_batch_size} is not a multiple of --micro_batch_size {plan.micro_batch_size} x "
            f"data-parallel size {dp} = {unit}: use {max(unit, plan.global_batch_size // unit * unit)}"
        )


def _recomputation(plan: Plan, split: PipelineSplit) -> dict[str, Any]:
    """Return the fields of a Job, by finetune's own rules."""
    granularity = None if plan.recompute_granularity == "none" else plan.recompute_granularity
    numerics = Numerics(
        recompute_granularity=granularity, recompute_modules=plan.recompute_modules, recompute_method=plan.recompute_method,
        recompute_num_layers=plan.recompute_num_layers,
    )  # fmt: skip
    recompute_is_consistent(numerics)
    recompute_groups_fit(numerics, [len(chunk) for stage in split.chunks for chunk in stage])
    return {
        "recompute": plan.recompute_granularity, "recompute_modules": tuple(plan.recompute_modules) or ("core_attn",),
        "recompute_method": plan.recompute_method or "uniform", "recompute_layers": plan.recompute_num_layers or 1,
    }  # fmt: skip


def _teacher(arch: Architecture, plan: Plan, parallel: Parallelism, split: PipelineSplit) -> Architecture | None:
    """Return the architecture of the teacher. Raise ConfigError if it has another vocabulary, or the layout does not divide it."""
    from megatron_ft.models.architecture import check_layout
    from megatron_ft.models.pipeline import split_beside
    from megatron_ft.planner import known

    if plan.teacher is None:
        return None
    found: Architecture = known.architecture(plan.teacher)
    if found.vocab_size != arch.vocab_size:
        raise ConfigError(
            f"--teacher {plan.teacher} has a vocabulary of {found.vocab_size}, the model one of {arch.vocab_size}: it must have the same"
        )
    check_layout(found, parallel.tensor_model_parallel_size)
    split_beside(split, arch.num_layers, found.num_layers)
    return found


def _lora(arch: Architecture, plan: Plan) -> Lora | None:
    from megatron_ft.adapters.spec import from_settings
    from megatron_ft.config.sections import Adapters

    count = plan.train_new_tokens
    if not 0 <= count <= arch.vocab_size:
        raise ConfigError(f"--train_new_tokens {count}: must be from 0 to the model's {arch.vocab_size} tokens")
    section = Adapters(
        plan.lora_rank, lora_dropout=plan.lora_dropout or None, lora_target=plan.lora_target,
        train_new_tokens=bool(count),
    )  # fmt: skip
    return from_settings(section, arch, added=range(arch.vocab_size - count, arch.vocab_size))


def _by_recompute(arch: Architecture, job: Job) -> dict[str, list[int]]:
    """Return the activation bytes of each stage for each recomputation: none, of attention, of MLPs and norms, of whole layers."""
    from megatron_ft.planner import memory, search

    ways = {
        "none": _with(job, recompute="none"),
        "selective": _with(job, recompute="selective", recompute_modules=("core_attn",)),
    }
    ways |= {"mlp + layernorm": search.recomputing_modules(job), "full": search.whole_layers(job)}
    return {how: [stage.activations + stage.working for stage in memory.stages(arch, one)] for how, one in ways.items()}


def _with(job: Job, **changes: Any) -> Job:
    from dataclasses import replace

    return replace(job, **changes)


if __name__ == "__main__":
    sys.exit(run_script(COMMAND, run))
