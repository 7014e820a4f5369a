"""The process that measures one configuration: `python -m megatron_ft.evaluation.measuring.worker --job F --result F`.

A process of its own, because neither a GPU's allocator nor a C library gives all memory back, and one configuration's would count for the
next. It imports what a backend needs before the first peak is read, so the peaks of loading and of runs begin from the same libraries.
"""

from __future__ import annotations

import contextlib
import sys
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path

from megatron_ft.config.cli import Command, run_script
from megatron_ft.config.sections import Processes
from megatron_ft.engine.forked import die_with_parent
from megatron_ft.evaluation.measuring.job import NO_ROOM, Job, Loaded, Measured, Run
from megatron_ft.files import read_json, write_json

_WARM_UP = 4  # tokens that are generated before the first run: libraries compile and allocate at their first use


@dataclass
class Worker:
    """Worker"""

    job: str = field(default="", metadata={"required": True})
    """file with the job"""
    result: str = field(default="", metadata={"required": True})
    """file for what was measured"""


COMMAND = Command(name="measure", summary="measures one configuration", sections=(Worker, Processes))


def run(options: Worker, processes: Processes) -> int:
    """Measure, in as many processes as are asked for. Where one of several has no room, its result is written and the others are ended."""
    from megatron_ft.engine.parallel import rank
    from megatron_ft.engine.start import prepare_engine
    from megatron_ft.launch.run import launch, planned

    die_with_parent()
    if (starts := planned(processes)) and (code := launch(starts, None, prepare_engine)) is not None:
        return code
    job = Job(**read_json(Path(options.job)))
    measured = measure(job)
    if rank() == 0 or measured.failed:
        write_json(Path(options.result), measured.to_json())
    return int(bool(measured.failed) and job.processes > 1)


def measure(job: Job) -> Measured:
    """Load the model, warm up, answer each prompt, and time a product. A GPU without room makes a result that says so."""
    import torch

    try:
        return _measure(job)
    except torch.OutOfMemoryError:
        return Measured(job.bits, _kinds(job)[job.bits], failed=NO_ROOM)


def _measure(job: Job) -> Measured:
    from megatron_ft.evaluation.measuring import memory
    from megatron_ft.evaluation.measuring.clock import seconds_of

    _import(job)
    memory.restart_peak()
    start = memory.peak_bytes()
    with contextlib.ExitStack() as opened:
        models: list[Loaded] = []
        load_seconds = seconds_of(lambda: models.append(opened.enter_context(_loaded(job))))
        model, load_peak = models[0], memory.peak_bytes()
        model.generate(model.prompts[0], min(_WARM_UP, job.max_new_tokens))
        restarted = memory.restart_peak()
        runs = [_run(model, ids, job.max_new_tokens) for ids in model.prompts]
        return model.together(
            Measured(
                job.bits, model.kind, None, model.weight_bytes, start, load_seconds, load_peak, restarted, runs, model.product()
            )
        )  # fmt: skip


def _run(model: Loaded, ids: list[int], count: int) -> Run:
    from megatron_ft.evaluation.measuring import memory
    from megatron_ft.evaluation.measuring.clock import seconds_of

    memory.restart_peak()
    answers: list[list[int]] = []
    seconds = seconds_of(lambda: answers.append(model.generate(ids, count)))
    return Run(len(ids), len(answers[0]), seconds, memory.peak_bytes(), model.decode(answers[0]))


@contextlib.contextmanager
def _loaded(job: Job) -> Iterator[Loaded]:
    if job.backend == "engine":
        from megatron_ft.evaluation.measuring.with_engine import loaded

        with loaded(job) as model:
            yield model
    else:
        from megatron_ft.evaluation.measuring.with_transformers import load

        yield load(job)


def _import(job: Job) -> None:
    """Import the libraries, choose the device."""
    from megatron_ft import device

    if job.backend == "engine":
        from megatron_ft.engine.start import prepare_engine

        prepare_engine()
    else:
        device.select(0)
        import transformers

        _ = transformers.AutoModelForCausalLM, transformers.AutoTokenizer  # they are imported when they are named
        if job.bits < 16:
            import bitsandbytes  # noqa: F401


def _kinds(job: Job) -> dict[int, str]:
    from megatron_ft.evaluation.measuring import with_engine, with_transformers

    return with_engine.KINDS if job.backend == "engine" else with_transformers.KINDS


if __name__ == "__main__":
    sys.exit(run_script(COMMAND, run))
