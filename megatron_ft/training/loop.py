"""The training loop: steps, evaluations and checkpoints, in that order, until train_iters."""

from __future__ import annotations

import math
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

from megatron_ft import device
from megatron_ft.checkpoints.saver import Saver
from megatron_ft.checkpoints.training_state import Progress
from megatron_ft.data.loader import ChatDataset
from megatron_ft.models.architecture import Architecture
from megatron_ft.training import sample_hash
from megatron_ft.training.hooks import Hook
from megatron_ft.training.replicas import check_replicas
from megatron_ft.training.samples import Sampler
from megatron_ft.training.step import Stepper, StepResult
from megatron_ft.training.stopping import BrokenGradients, Skipped, StopRequest
from megatron_ft.training.throughput import peak_tflops, step_flops
from megatron_ft.wording import counted


@dataclass
class Run:
    """Everything the loop needs, already built."""

    stepper: Stepper
    train_set: ChatDataset
    valid_set: ChatDataset | None
    optimizer: Any
    schedule: Any
    hooks: Sequence[Hook]
    saver: Saver | None
    train_iters: int
    save_interval: int | None
    eval_interval: int | None
    eval_iters: int
    max_skipped: int = 10
    check_replicas_every: int | None = None
    architecture: Architecture | None = None
    """To count operations by; None: not counted."""
    sampler: Sampler | None = None
    """Answers prompts; None: there are none."""
    sample_interval: int | None = None
    skipped: Skipped = field(default_factory=Skipped)
    """Filled by train()."""


def train(run: Run, progress: Progress, stop: StopRequest) -> Progress:
    """Train from `progress` to run.train_iters, or until a signal asks to stop. All ranks call it together.

    Hooks are given to the reporting rank only. Raise BrokenGradients after run.max_skipped steps in a row that had to be skipped;
    a loss scale that finds its height, and batches without a supervised token, do not count. Raise ReplicasDiffer.
    """
    skipped = 0
    try:
        stopping = stop.agreed()  # requested while loading: there is nothing new to save
        if run.sampler and not progress.iteration and not stopping:
            _sample(run, run.sampler, progress)
        while progress.iteration < run.train_iters and not stopping:
            metrics = _timed_step(run, progress)
            progress = Progress(
                progress.iteration + 1, metrics["train/consumed_samples"], metrics["train/samples_hash"]
            )
            for hook in run.hooks:
                hook.on_step(progress.iteration, metrics)
            if _due(progress.iteration, run.check_replicas_every):
                run.stepper.settle()
                check_replicas(run.stepper.model, progress.iteration)
            skipped = skipped + 1 if run.skipped.count(metrics) else 0
            if skipped >= run.max_skipped:
                raise BrokenGradients(
                    f"{counted(skipped, 'step')} in a row had gradients that are not finite, up to iteration {progress.iteration}: "
                    f"resume from an earlier checkpoint with a lower --lr or --clip_grad"
                )
            stopping = stop.agreed(progress.iteration)
            last = progress.iteration == run.train_iters
            if (
                run.valid_set
                and run.eval_iters
                and not stopping
                and (last or _due(progress.iteration, run.eval_interval))
            ):
                _evaluate(run, run.valid_set, progress)
            if run.sampler and not stopping and (last or _due(progress.iteration, run.sample_interval)):
                _sample(run, run.sampler, progress)
            if run.saver:
                due = _due(progress.iteration, run.save_interval)
                _save(run, run.saver, progress, due, leaving=last or stopping)
    except BrokenGradients:  # raised on all ranks; a save in progress has an earlier state
        if run.saver:
            run.saver.committed(wait=True)
        raise
    finally:
        for hook in run.hooks:
            hook.on_end()
    return progress


def _save(run: Run, saver: Saver, progress: Progress, due: bool, leaving: bool) -> None:
    """Save if it is time to, and say what has been committed meanwhile; before the run is left, nothing stays in the background."""
    if due or leaving:
        run.stepper.settle()
    done = saver.save(progress) if due or leaving else []
    for saved in done + saver.committed(wait=leaving):
        for hook in run.hooks:
            hook.on_save(saved.iteration, saved.folder)


def _due(iteration: int, interval: int | None) -> bool:
    return interval is not None and iteration % interval == 0


def _timed_step(run: Run, progress: Progress) -> dict[str, Any]:
    rate = run.optimizer.param_groups[0]["lr"]
    start = time.perf_counter()
    last = progress.iteration + 1 == run.train_iters
    result = run.stepper.train(run.train_set, progress.consumed_samples, run.optimizer, last)
    device.synchronize()
    if not result.skipped:
        run.schedule.step(increment=1)
    batch, seconds = run.stepper.global_batch_size, time.perf_counter() - start
    return {
        "train/loss": result.loss,
        "train/perplexity": perplexity(result.loss),
        "train/lr": rate,
        "train/grad_norm": result.grad_norm,
        "train/seconds": seconds,
        "train/tokens": result.tokens,
        "train/supervised_tokens": result.supervised_tokens,
        "train/tokens_per_second": result.tokens / seconds,
        "train/supervised_tokens_per_second": result.supervised_tokens / seconds,
        "train/global_batch_size": batch,
        "train/consumed_samples": progress.consumed_samples + batch,
        "train/samples_hash": sample_hash.extend(
            progress.samples_hash, run.train_set, progress.consumed_samples, batch
        ),
        "train/skipped": int(result.skipped),
        "train/overflow": int(result.overflow),
        "train/empty": int(result.empty),
        **({"train/loss_scale": result.loss_scale} if run.stepper.model[0].config.fp16 else {}),
        **_throughput(run, result, seconds),
        "train/memory_gb": device.peak_memory_bytes() / 1e9,
        **{f"train/seconds_{phase}": seconds for phase, seconds in run.stepper.phases.items()},
        **{f"train/{name}": value for name, value in result.more.items()},
    }


def _throughput(run: Run, result: StepResult, seconds: float) -> dict[str, float]:
    """Return TFLOP/s of each GPU and the share of its peak (MFU); {} on a CPU."""
    name = device.gpu_name()
    if name is None or run.architecture is None:
        return {}
    flops = step_flops(run.architecture, result.tokens, result.seen)
    rate = flops / seconds / run.stepper.layout.world_size / 1e12
    peak = peak_tflops(name)
    return {"train/tflops": rate} | ({"train/mfu": rate / peak} if peak else {})


def perplexity(loss: float) -> float:
    """Return exp of a loss in nats per token, at most the largest float that can be logged."""
    return math.exp(min(loss, 700))


def _evaluate(run: Run, valid_set: ChatDataset, progress: Progress) -> None:
    result = run.stepper.evaluate(valid_set, run.eval_iters)
    metrics = {
        "eval/loss": result.loss,
        "eval/perplexity": perplexity(result.loss),
        "eval/tokens": result.tokens,
        "eval/supervised_tokens": result.supervised_tokens,
        **{f"eval/{name}": value for name, value in result.more.items()},
    }
    for hook in run.hooks:
        hook.on_eval(progress.iteration, metrics)


def _sample(run: Run, sampler: Sampler, progress: Progress) -> None:
    run.stepper.settle()  # else ranks with fewer prompts would not take part in gathering the weights
    if samples := sampler():
        for hook in run.hooks:
            hook.on_samples(progress.iteration, samples)
