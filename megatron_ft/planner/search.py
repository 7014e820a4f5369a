"""Search for layouts of a model on a number of GPUs that fit into memory, sorted by estimated time."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace

from megatron_ft.config.sections import Parallelism
from megatron_ft.errors import ConfigError
from megatron_ft.models.architecture import Architecture, check_layout
from megatron_ft.models.families import family_of
from megatron_ft.models.pipeline import PipelineSplit, split_beside, split_layers
from megatron_ft.models.quantised import check_blocks
from megatron_ft.planner.figures import step_time
from megatron_ft.planner.known import Gpu
from megatron_ft.planner.memory import RECOMPUTE, Job, stages

MICRO_BATCHES = (1, 2, 4, 8)
CHUNKS = (1, 2, 4, 5)
"""Numbers of chunks per stage in the search (interleaving)."""


@dataclass(frozen=True)
class Proposal:
    """A layout with its cost. seconds: per step. memory: of the fullest GPU, in bytes."""

    job: Job
    seconds: float
    memory: int


def proposals(arch: Architecture, job: Job, gpu: Gpu, memory: float, gpus_per_node: int) -> list[Proposal]:
    """Return the layouts of job.gpus GPUs that fit into `memory` bytes each, with unchanged batch and row length; fastest first.

    Of layouts that differ only in microbatch, recomputation and chunks, the fastest is returned.
    """
    best: dict[tuple[int, int, int], Proposal] = {}
    for candidate in candidates(arch, job, gpus_per_node):
        need = max(stage.total for stage in stages(arch, candidate))
        if need > memory:
            continue
        found = Proposal(candidate, step_time(arch, candidate, gpu, gpus_per_node).total, need)
        key = (candidate.tp, candidate.pp, candidate.dp)
        if key not in best or (found.seconds, need) < (best[key].seconds, best[key].memory):
            best[key] = found
    return sorted(best.values(), key=lambda proposal: (proposal.seconds, proposal.memory))


def candidates(arch: Architecture, job: Job, gpus_per_node: int) -> Iterator[Job]:
    """Yield layouts that divide model and batch. Tensor parallelism stays within a node, where links are fast.

    Context parallelism is not proposed: it needs Transformer Engine and rows of one sample.
    """
    for tp in _divisors(min(job.gpus, gpus_per_node)):
        if job.gpus % tp or not _divides(arch, tp, job.nf4, job.teacher) or (tp > 1 and job.seq_length % tp):
            continue
        for pp in _divisors(job.gpus // tp):
            dp = job.gpus // tp // pp
            for micro in MICRO_BATCHES:
                if job.global_batch % (micro * dp):
                    continue
                for chunks in CHUNKS if pp > 1 else (1,):
                    split = _split(arch, pp, chunks, job.teacher)
                    if split is None or (chunks > 1 and job.global_batch // (micro * dp) % pp):
                        continue
                    for recompute in RECOMPUTE:
                        yield replace(
                            job, split=split, tp=tp, cp=1, dp=dp, micro_batch=micro, recompute=recompute,
                            sequence_parallel=tp > 1, distributed_optimizer=dp > 1,
                        )  # fmt: skip


def flags(job: Job) -> str:
    """Return finetune's flags for this layout."""
    words = [f"--tensor_model_parallel_size {job.tp}", f"--pipeline_model_parallel_size {job.pp}"]
    if job.split.virtual_size > 1:
        words.append(f"--virtual_pipeline_model_parallel_size {job.split.virtual_size}")
    words += [f"--context_parallel_size {job.cp}"] if job.cp > 1 else []
    words.append(f"--micro_batch_size {job.micro_batch}")
    words += ["--sequence_parallel"] if job.sequence_parallel else []
    words += ["--use_distributed_optimizer"] if job.distributed_optimizer else []
    words += [f"--recompute_granularity {job.recompute}"] if job.recompute != "none" else []
    return " ".join(words)


def _split(arch: Architecture, pp: int, chunks: int, teacher: Architecture | None) -> PipelineSplit | None:
    try:
        found = split_layers(
            arch.num_layers,
            Parallelism(
                pipeline_model_parallel_size=pp, virtual_pipeline_model_parallel_size=chunks if chunks > 1 else None
            ),
        )
        if teacher:
            split_beside(found, arch.num_layers, teacher.num_layers)
        return found
    except ConfigError:
        return None


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


def _divisors(number: int) -> list[int]:
    return [d for d in range(1, number + 1) if number % d == 0]
