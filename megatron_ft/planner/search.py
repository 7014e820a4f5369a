"""Search for layouts of a model on a number of GPUs that fit into memory, sorted by estimated time."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace

from megatron_ft.errors import ConfigError
from megatron_ft.models.architecture import Architecture, check_layout
from megatron_ft.models.families import family_of
from megatron_ft.models.pipeline import PipelineSplit, split_beside
from megatron_ft.models.quantised import check_blocks
from megatron_ft.planner.figures import step_time
from megatron_ft.planner.known import Gpu
from megatron_ft.planner.memory import Job, most_memory
from megatron_ft.planner.splits import flags_of, nearly_even

MICRO_BATCHES = (1, 2, 4, 8)
CHUNKS = (1, 2, 4, 5)
"""Numbers of chunks per stage in the search (interleaving)."""
SHARED_POSITIONS = 4096
"""Fewest positions of a row on one GPU with context parallelism."""
LONG = 32768
"""Positions of a row from which context parallelism is proposed beside other layouts."""


@dataclass(frozen=True)
class Proposal:
    """A layout with its cost. seconds: per step. memory: of the fullest GPU, in bytes."""

    job: Job
    seconds: float
    memory: int


def proposals(arch: Architecture, job: Job, gpu: Gpu, memory: float, gpus_per_node: int) -> list[Proposal]:
    """Return the layouts of job.gpus GPUs that fit into `memory` bytes each, with unchanged batch and row length; fastest first.

    Of layouts that differ only in microbatch, recomputation and chunks, the fastest is returned. Context parallelism is proposed for long
    rows, and where nothing fits without: it needs Transformer Engine, and rows of one sample.
    """
    best: dict[tuple[int, int, int], Proposal] = {}
    for context in (False, True):
        if context and best and job.seq_length < LONG:
            break
        for candidate in candidates(arch, job, gpus_per_node, context):
            for fitting in recomputations(arch, candidate, memory):
                seconds = step_time(arch, fitting, gpu, gpus_per_node).total
                found = Proposal(fitting, seconds, most_memory(arch, fitting))
                key = (found.job.tp, found.job.pp, found.job.cp)
                if key not in best or (seconds, found.memory) < (best[key].seconds, best[key].memory):
                    best[key] = found
    return sorted(best.values(), key=lambda proposal: (proposal.seconds, proposal.memory))


def given(
    arch: Architecture, job: Job, gpu: Gpu, memory: float, gpus_per_node: int, micro_batch: int | None
) -> Job | None:
    """Return the fastest layout that fits with the job's own recomputation, else the one that needs least memory; None if none divides
    model and batch. micro_batch: rows; None: any number.
    """
    fitting: list[tuple[float, int, Job]] = []
    others: list[tuple[float, int, Job]] = []
    micro_batches = (micro_batch,) if micro_batch else MICRO_BATCHES
    for context in (False, True):
        for candidate in candidates(arch, job, gpus_per_node, context, micro_batches):
            one = replace(candidate, **{name: getattr(job, name) for name in _RECOMPUTATION})
            need = most_memory(arch, one)
            seconds = step_time(arch, one, gpu, gpus_per_node).total
            (fitting if need <= memory else others).append(
                (seconds if need <= memory else need, len(fitting) + len(others), one)
            )
        if fitting:
            return min(fitting)[-1]
    return min(others)[-1] if others else None


_RECOMPUTATION = ("recompute", "recompute_modules", "recompute_method", "recompute_layers")


def candidates(
    arch: Architecture,
    job: Job,
    gpus_per_node: int,
    context: bool = False,
    micro_batches: tuple[int, ...] = MICRO_BATCHES,
) -> Iterator[Job]:
    """Yield layouts that divide model and batch, without recomputation. Tensor parallelism stays within a node, where links are fast.

    context: those with context parallelism, else those without.
    """
    for layout in layouts(arch, job, gpus_per_node, context):
        for micro in micro_batches:
            if job.global_batch % (micro * layout.dp):
                continue
            for chunks in CHUNKS if layout.pp > 1 else (1,):
                split = _split(arch, layout.pp, chunks, job.teacher)
                count = job.global_batch // (micro * layout.dp)
                if split and (chunks == 1 or count % layout.pp == 0):
                    yield replace(layout, split=split, micro_batch=micro)


def layouts(arch: Architecture, job: Job, gpus_per_node: int, context: bool = False) -> Iterator[Job]:
    """Yield one layout for each TP, PP and CP: microbatches of one row, a chunk per stage, no recomputation."""
    for tp in _divisors(job.gpus, gpus_per_node):
        if not _divides(arch, tp, job.nf4, job.teacher) or (tp > 1 and job.seq_length % tp):
            continue
        for cp in _context_sizes(job, tp) if context else (1,):
            for pp in _divisors(job.gpus // tp // cp, arch.num_layers):
                dp = job.gpus // (tp * cp * pp)
                split = None if job.global_batch % dp else _split(arch, pp, 1, job.teacher)
                if split:
                    yield replace(
                        job, split=split, tp=tp, cp=cp, dp=dp, micro_batch=1, recompute="none",
                        sequence_parallel=tp > 1, distributed_optimizer=dp * cp > 1,
                    )  # fmt: skip


def _context_sizes(job: Job, tp: int) -> list[int]:
    """Return the sizes above 1 that divide the GPUs and the row, as config.checks.context_fits has it."""
    sizes = _divisors(job.gpus // tp, job.seq_length // SHARED_POSITIONS)
    return [cp for cp in sizes if cp > 1 and job.seq_length % (2 * tp * cp) == 0]


def recomputations(arch: Architecture, job: Job, memory: float) -> Iterator[Job]:
    """Yield the job as it is if it fits, else with each way of recomputation that makes it fit: the MLPs and norms, the fewest whole layers
    per chunk, all layers.
    """
    if most_memory(arch, job) <= memory:
        yield job
        return
    if most_memory(arch, modules := recomputing_modules(job)) <= memory:
        yield modules
    if most_memory(arch, whole := whole_layers(job)) <= memory:
        yield whole
        yield from _fewest_layers(arch, job, memory)


def recomputing_modules(job: Job) -> Job:
    """Return the job with the MLPs and norms of every layer recomputed."""
    return replace(job, recompute="selective", recompute_modules=("mlp", "layernorm"))


def whole_layers(job: Job) -> Job:
    """Return the job with every layer recomputed."""
    return replace(job, recompute="full", recompute_method="uniform", recompute_layers=1)


def least_memory(arch: Architecture, job: Job, gpus_per_node: int) -> tuple[int, Job] | None:
    """Return the bytes on the fullest GPU, and the layout, of the one that needs least memory; None if none divides model and batch."""
    found = [
        (most_memory(arch, one), number, one)
        for context in (False, True)
        for number, layout in enumerate(layouts(arch, job, gpus_per_node, context))
        for one in (layout, whole_layers(layout))
    ]
    need, _, best = min(found, key=lambda entry: entry[:2], default=(0, 0, None))
    return None if best is None else (need, best)


def _fewest_layers(arch: Architecture, job: Job, memory: float) -> Iterator[Job]:
    low, high = 0, max(len(chunk) for stage in job.split.chunks for chunk in stage)  # high is as good as all
    found = None
    while high - low > 1:
        middle = (low + high) // 2
        one = replace(job, recompute="full", recompute_method="block", recompute_layers=middle)
        if most_memory(arch, one) <= memory:
            high, found = middle, one
        else:
            low = middle
    if found:
        yield found


def flags(job: Job) -> str:
    """Return finetune's flags for this layout."""
    words = [f"--tensor_model_parallel_size {job.tp}", *flags_of(job.split)]
    words += [f"--context_parallel_size {job.cp} --no_packing"] if job.cp > 1 else []
    words += [f"--micro_batch_size {job.micro_batch} --global_batch_size {job.global_batch}"]
    words += [f"--seq_length {job.seq_length}"]
    words += ["--sequence_parallel"] if job.sequence_parallel else []
    words += ["--use_distributed_optimizer"] if job.distributed_optimizer else []
    words += ["--bf16"] if job.bf16 else []
    words += adapter_flags(job)
    return " ".join([*words, recompute_flags(job)]).strip()


def adapter_flags(job: Job) -> list[str]:
    """Return finetune's flags for adapters and their base."""
    base = ["--base_precision nf4"] if job.nf4 else []
    if job.lora is None:
        return base
    words = [f"--lora_rank {job.lora.rank} --lora_target {','.join(job.lora.targets)}"]
    words += [f"--lora_dropout {job.lora.dropout:g}"] if job.lora.dropout else []
    return words + (["--train_new_tokens"] if job.lora.new_tokens else []) + base


def recompute_flags(job: Job) -> str:
    """Return finetune's flags for the recomputation; "" without any."""
    if job.recompute == "none":
        return ""
    words = f"--recompute_granularity {job.recompute}"
    if job.recompute == "selective" and job.recompute_modules != ("core_attn",):
        return f"{words} --recompute_modules {' '.join(job.recompute_modules)}"
    if job.recompute == "full" and (job.recompute_method, job.recompute_layers) != ("uniform", 1):
        return f"{words} --recompute_method {job.recompute_method} --recompute_num_layers {job.recompute_layers}"
    return words


def recompute_words(job: Job) -> str:
    """Return the recomputation in a few words: none, full, mlp + layernorm, 3 layers."""
    if job.recompute == "selective":
        return " + ".join(job.recompute_modules)
    if job.recompute == "full" and job.recompute_method == "block":
        return f"{job.recompute_layers} layer{'s' * (job.recompute_layers > 1)}"
    return job.recompute


def _split(arch: Architecture, pp: int, chunks: int, teacher: Architecture | None) -> PipelineSplit | None:
    found = nearly_even(arch.num_layers, pp, chunks)
    try:
        if found and teacher:
            split_beside(found, arch.num_layers, teacher.num_layers)
    except ConfigError:
        return None
    return found


def _divides(arch: Architecture, tp: int, nf4: bool, teacher: Architecture | None) -> bool:
    try:
        check_layout(arch, tp)
        if teacher:
            check_layout(teacher, tp)
        if nf4:
            check_blocks(arch, family_of(arch).rules(arch), tp)
    except ConfigError:
        return False
    return True


def _divisors(number: int, most: int) -> list[int]:
    return [d for d in range(1, min(number, most) + 1) if number % d == 0]
