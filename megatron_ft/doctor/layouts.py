"""Compare one step on two processes with the same step on one: loss, gradient norm and every gradient."""

from __future__ import annotations

import pickle
from collections.abc import Sequence
from pathlib import Path

from megatron_ft import device, gpu_facts
from megatron_ft.config.sections import Kernels, Parallelism
from megatron_ft.doctor.judge import judge_layouts
from megatron_ft.doctor.ranks import run_on_ranks
from megatron_ft.doctor.result import Found, failed, skipped
from megatron_ft.doctor.small_model import LLAMA, SEQ_LENGTH
from megatron_ft.files import read_json, write_json
from megatron_ft.training.invariance import Case, Problem, compare, measure

PROBLEM = Problem(LLAMA, SEQ_LENGTH)
PROCESSES = 2
FOUND, GIVEN = "layouts.json", "layouts.pickle"


def tensor_and_data(folder: Path) -> Found:
    cases = [
        Case("TP2", PROCESSES, Parallelism(2)),
        Case("TP2 + sequence parallel", PROCESSES, Parallelism(2, sequence_parallel=True), micro_batch_size=2),
        Case("DP2", PROCESSES),
    ]
    return compared(folder, cases)


def pipeline(folder: Path) -> Found:
    two = Parallelism(pipeline_model_parallel_size=2)
    return compared(
        folder, [Case("PP2", PROCESSES, two), Case("PP2, two rows at once", PROCESSES, two, micro_batch_size=2)]
    )


def interleaved(folder: Path) -> Found:
    """Check two chunks per stage that exchange activations without overlap, and on GPUs also with overlap."""
    chunks = Parallelism(pipeline_model_parallel_size=2, virtual_pipeline_model_parallel_size=2)
    cases = [Case("interleaved", PROCESSES, chunks)]
    if device.has_gpu():
        return compared(
            folder, [*cases, Case("with overlap", PROCESSES, chunks, kernels=Kernels(overlap_p2p_communication=True))]
        )
    found = compared(folder, cases)
    return Found(found.outcome, f"{found.detail}; --overlap_p2p_communication only on GPUs")


def compared(folder: Path, cases: Sequence[Case]) -> Found:
    """Compute the reference in this process and the cases on two ranks, one after another; compare them."""
    if device.has_gpu() and len(gpu_facts.gpus()) < PROCESSES:
        return skipped("this machine has one GPU, a layout needs two; MEGATRON_FT_DEVICE=cpu tests it on CPU processes")
    reference = measure(PROBLEM, Case("one process", 1))
    (folder / GIVEN).write_bytes(pickle.dumps((reference, list(cases))))
    write_json(folder / FOUND, {})
    ended = run_on_ranks("layouts:on_ranks", folder, PROCESSES, 120)
    found = read_json(folder / FOUND)
    if ended.code != 0:
        missing = next((case.name for case in cases if case.name not in found), "after the last case")
        return failed(f"{missing}: {ended.reason}")
    return judge_layouts(found)


def on_ranks(folder: Path) -> None:
    """Compute every case on this rank. Rank 0 writes {name: [largest relative difference, where]} after each."""
    reference, cases = pickle.loads((folder / GIVEN).read_bytes())
    found: dict[str, list] = {}
    for case in cases:
        measured = measure(PROBLEM, case)
        if measured is not None:
            apart = compare(reference, measured)
            found[case.name] = [apart.largest, apart.where.removeprefix("model.")]
            write_json(folder / FOUND, found)
