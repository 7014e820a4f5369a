"""The layout of a run: one process on a CPU, on GPUs the planner's fastest that fits into their memory."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import replace
from typing import Any

from megatron_ft.adapters.spec import Lora, from_settings
from megatron_ft.config.sections import Adapters, Parallelism
from megatron_ft.config.settings import TrainingSettings
from megatron_ft.errors import ConfigError
from megatron_ft.models.pipeline import split_layers
from megatron_ft.planner import known
from megatron_ft.planner.memory import Job
from megatron_ft.planner.search import Proposal, flags, proposals
from megatron_ft.tune.choice import Choice
from megatron_ft.tune.look import Machine, Model
from megatron_ft.wording import counted

TP, PP = "tensor_model_parallel_size", "pipeline_model_parallel_size"
TOKENS_ON_CPU = 4096
"""Of a microbatch at most."""
KEPT_FREE = 0.9
"""Share of a GPU's memory to plan with; the rest is for what the planner does not know."""
MOST_GPUS = 1024


def layout(
    choice: Choice, model: Model, machine: Machine, given: Mapping[str, Any], settings: TrainingSettings, length: int,
    batch: int,
) -> None:  # fmt: skip
    """Add the flags of the layout to the choice. Raise ConfigError if the model fits into no layout of these GPUs."""
    if not machine.gpus:
        _on_cpu(choice, given, settings, length, batch)
        return
    job = Job(
        split_layers(model.arch.num_layers, Parallelism()), 1, machine.gpus, length, 1, batch,
        bf16=not settings.numerics.fp16, lora=_lora(choice, model), nf4=settings.adapters.base_precision == "nf4",
    )  # fmt: skip
    best = _best(model, job, machine, given)
    if best is None and job.lora and not job.nf4:
        best = _best(model, replace(job, nf4=True), machine, given)
        if best:
            choice.take(given, "base_precision", "nf4", "the frozen model fits only in 4 bits, as QLoRA")
    if best is None:
        raise ConfigError(_too_large(model, job, machine, given))
    why = f"the planner's fastest layout that fits: {best.memory / 1e9:.0f} of {machine.memory / 1e9:.0f} GB a GPU"
    for name, value in _as_flags(best.job).items():
        choice.take(given, name, value, why)
    if not settings.numerics.fp16:
        choice.take(given, "bf16", True, "GPUs compute in bf16")


def processes(choice: Choice, machine: Machine) -> int:
    """Return the number of processes on each machine."""
    return machine.per_node or int(choice.flags[TP]) * int(choice.flags[PP])


def _on_cpu(
    choice: Choice, given: Mapping[str, Any], settings: TrainingSettings, length: int, batch: int
) -> None:  # fmt: skip
    micro = math.gcd(batch, 1 << max(0, (TOKENS_ON_CPU // length).bit_length() - 1))
    choice.take(given, "micro_batch_size", micro, f"at most {TOKENS_ON_CPU:,} tokens at once")
    choice.take(given, TP, settings.parallel.tensor_model_parallel_size, "one process; its threads share the cores")
    choice.take(given, PP, settings.parallel.pipeline_model_parallel_size, "one process")


def _lora(choice: Choice, model: Model) -> Lora | None:
    if "lora_rank" not in choice.flags:
        return None
    return from_settings(Adapters(int(choice.flags["lora_rank"])), model.arch)


def _best(model: Model, job: Job, machine: Machine, given: Mapping[str, Any]) -> Proposal | None:
    """Return the fastest layout that fits, of those that the user's flags allow."""
    gpu = known.gpu(machine.kind)
    found = proposals(model.arch, job, gpu, KEPT_FREE * machine.memory, max(1, machine.per_node))
    return next((one for one in found if _allowed(one.job, given)), None)


def _allowed(job: Job, given: Mapping[str, Any]) -> bool:
    return all(str(given.get(name, size)) == str(size) for name, size in ((TP, job.tp), (PP, job.pp)))


def _as_flags(job: Job) -> dict[str, Any]:
    """Return the planner's flags by name."""
    found: dict[str, Any] = {}
    for text in f" {flags(job)}".split(" --")[1:]:
        name, _, value = text.partition(" ")
        found[name] = value or True
    return found


def _too_large(model: Model, job: Job, machine: Machine, given: Mapping[str, Any]) -> str:
    """Say what would be enough."""
    counts = (machine.gpus * 2**n for n in range(1, 11) if machine.gpus * 2**n <= MOST_GPUS)
    enough = next((n for n in counts if _best(model, _larger(job, n), replace(machine, gpus=n), given)), None)
    lora = "" if job.lora else "--lora, or "
    more = f"more GPUs: --gpus {enough} are enough" if enough else "more or larger GPUs"
    return f"{model.folder} fits into no layout of {counted(machine.gpus, 'GPU')} of {machine.memory / 1e9:.0f} GB: use {lora}{more}"


def _larger(job: Job, gpus: int) -> Job:
    return replace(job, dp=gpus, global_batch=-(-job.global_batch // gpus) * gpus)
