"""megatron-ft measure: peak memory and time of generation with a model in 16, 8 and 4 bits."""

from __future__ import annotations

import sys
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Literal

from megatron_ft.config.cli import Command, run_script
from megatron_ft.errors import CheckpointError, ConfigError

if TYPE_CHECKING:
    from megatron_ft.evaluation.measuring.job import Job


@dataclass
class Measure:
    """Model and prompts"""

    model: str = field(default="", metadata={"required": True})
    """folder of a Hugging Face model, or of a checkpoint"""
    bits: list[str] = field(default_factory=list)
    """precisions of the weights, separated by commas: 32, 16, 8 or 4; default: 16,8,4 with transformers, 16,4 with the engine"""
    backend: Literal["transformers", "engine"] | None = None
    """transformers (with bitsandbytes for 8 and 4 bits) or this project's engine; default: transformers for a Hugging Face folder"""
    adapter: str | None = None
    """with the engine: adapters of the model, a checkpoint of a run with --lora_rank or a PEFT folder"""
    prompts: str | None = None
    """file of prompts, one JSON object per line: {"prompt": text} or {"messages": [...]}; default: five short ones"""
    max_new_tokens: int = 100
    """number of tokens per answer; an end-of-text token does not end it"""
    sparse: bool = False
    """of a model with ReLU, on a CPU: measure dense and sparse decoding with the same kernel, instead of precisions"""
    sparse_weights: Literal["fp32", "bf16", "int8"] | None = None
    """with --sparse: precision of the weights; default: bf16 for a model in bf16, else fp32"""
    predictors: str | None = None
    """with --sparse: folder that train-predictors has written for this model, to measure predicted rows too"""
    output: str | None = None
    """folder for measure.json, measure.html and the charts; default: only print the table; with --sparse only measure.json"""


@dataclass(frozen=True)
class MeasureLayout:
    """Parallel layout, with the engine"""

    tensor_model_parallel_size: int | None = None
    """number of parts that each weight matrix is split into (TP); default: 1, of a classic checkpoint its own"""
    pipeline_model_parallel_size: int | None = None
    """number of pipeline stages that the layers are divided over (PP); default: 1, of a classic checkpoint its own"""


COMMAND = Command(
    name="measure",
    summary="measure memory and time of a model in 16, 8 and 4 bits",
    sections=(Measure, MeasureLayout),
    examples=(
        "megatron-ft measure models/falcon-40b-instruct --bits 16,8,4 --output runs/measure",
        "megatron-ft measure runs/tuned --backend engine --bits 16,4 --max_new_tokens 20",
        "megatron-ft measure runs/llama2-70b --bits 16,4 --tensor_model_parallel_size 4",
        "megatron-ft measure runs/relu --sparse --sparse_weights int8",
    ),
    positional=("model",),
)


def run(options: Measure, parallel: MeasureLayout = MeasureLayout()) -> int:
    """Measure each precision in a process of its own; print the table. Return 1 if one failed for another reason than memory."""
    if options.sparse:
        return run_sparse(options, parallel)
    if given := (options.sparse_weights and "--sparse_weights") or (options.predictors and "--predictors"):
        raise ConfigError(f"{given} needs --sparse")
    jobs = planned(options, parallel)
    from megatron_ft.evaluation.measuring.page import setting_of, write
    from megatron_ft.evaluation.measuring.runner import measure_in_process
    from megatron_ft.evaluation.measuring.verdict import text_table, verdict_of_four
    from megatron_ft.files import atomic_folder

    results = []
    for job in jobs:
        print(f"measuring {job.bits} bits with {job.backend}", file=sys.stderr, flush=True)
        results.append(measure_in_process(job))
    print(text_table(results))
    if said := verdict_of_four(results):
        print(said)
    if options.output:
        with atomic_folder(options.output) as folder:
            write(folder, setting_of(jobs[0]), results)
        print(f"charts in {Path(options.output, 'measure.html')}")
    return int(any(one.failed and not one.is_full for one in results))


def run_sparse(options: Measure, parallel: MeasureLayout) -> int:
    """Measure sparse decoding; print the table, and write measure.json."""
    from megatron_ft.commands.generate import Generation, read_prompts
    from megatron_ft.commands.sparse_options import check_one_process, wait_asleep
    from megatron_ft.config.checks import positive
    from megatron_ft.config.sections import Processes

    wait_asleep()
    from megatron_ft.evaluation.measuring.job import PROMPTS
    from megatron_ft.files import atomic_folder, check_writable, refuse_existing, write_json
    from megatron_ft.generation.sparse_loading import described
    from megatron_ft.sparse.predictor_files import read_predictors

    if given := (options.bits and "--bits") or (options.backend and "--backend") or (options.adapter and "--adapter"):
        raise ConfigError(f"--sparse takes no {given}: it decodes with its own kernel; see --sparse_weights")
    positive(options, "max_new_tokens")
    sizes = parallel.tensor_model_parallel_size or 1, parallel.pipeline_model_parallel_size or 1
    check_one_process(Processes(), sizes[0] * sizes[1])
    arch = described(Path(options.model)).arch
    predictors = read_predictors(Path(options.predictors), arch) if options.predictors else None
    asked = Generation(prompts=options.prompts) if options.prompts else Generation(prompt=list(PROMPTS))
    conversations = [line["messages"] for line in read_prompts(asked)]
    if options.output:
        refuse_existing(options.output)
        check_writable("--output", options.output)
    from megatron_ft.evaluation.measuring.sparse import measure, table

    result = measure(Path(options.model), conversations, options.max_new_tokens, options.sparse_weights, predictors)
    print(table(result))
    if options.output:
        with atomic_folder(options.output) as folder:
            write_json(folder / "measure.json", result)
    return 0


def planned(options: Measure, parallel: MeasureLayout = MeasureLayout()) -> list[Job]:
    """Return the configurations to measure. Raise ConfigError or CheckpointError for what cannot be; mistakes do not wait for torch."""
    from megatron_ft.checkpoints.folder import check_folder, is_export
    from megatron_ft.commands.generate import Generation, read_prompts
    from megatron_ft.config.checks import positive
    from megatron_ft.evaluation.measuring.job import PROMPTS, Job
    from megatron_ft.evaluation.measuring.model_folder import stored_bits
    from megatron_ft.files import check_writable, refuse_existing

    positive(options, "max_new_tokens")
    folder = Path(options.model)
    for given in filter(None, (options.model, options.adapter)):
        check_folder(Path(given))
    backend = options.backend or ("transformers" if is_export(folder) and not options.adapter else "engine")
    bits = _bits(options.bits, backend, stored_bits(folder, backend))
    asked = Generation(prompts=options.prompts) if options.prompts else Generation(prompt=list(PROMPTS))
    conversations = [line["messages"] for line in read_prompts(asked)]
    if backend == "transformers":
        _check_transformers(options, folder, bits)
    if options.output:
        refuse_existing(options.output)
        check_writable("--output", options.output)
    stored = stored_bits(folder, backend) is not None
    sizes = _sizes(options, parallel, backend)
    return [
        Job(options.model, backend, number, conversations, options.max_new_tokens, stored, options.adapter, *sizes)
        for number in bits
    ]


def _sizes(options: Measure, parallel: MeasureLayout, backend: str) -> tuple[int, int]:
    """Return TP and PP. Raise ConfigError where the backend cannot split a model."""
    from megatron_ft.commands.layout_choice import Asked, bound_layout

    given = parallel.tensor_model_parallel_size, parallel.pipeline_model_parallel_size
    for name, size in zip(("tensor", "pipeline"), given, strict=True):
        if size is not None and size < 1:
            raise ConfigError(f"--{name}_model_parallel_size {size} must be at least 1")
    sizes = given[0] or 1, given[1] or 1
    if backend == "transformers":
        if sizes != (1, 1):
            raise ConfigError(
                "transformers measures a model in one process: give --backend engine, or drop the sizes of a layout"
            )
        return sizes
    return sizes if any(given) else bound_layout([Asked(options.model, options.adapter)]) or (1, 1)


def _bits(given: list[str], backend: str, stored: int | None) -> list[int]:
    """Return the precisions, the given ones or those of the backend. stored: that of a model which is quantised already."""
    from megatron_ft.evaluation.measuring.job import BITS, DEFAULT_BITS

    words = [word.strip() for entry in given for word in entry.split(",") if word.strip()]
    known = {str(number): number for number in BITS[backend]}
    if wrong := [word for word in words if word not in known]:
        other = "; for 8 bits give a Hugging Face folder and --backend transformers" if wrong[0] == "8" else ""
        raise ConfigError(f"--bits {wrong[0]}: with {backend} give some of {', '.join(known)}{other}")
    bits = list(dict.fromkeys(known[word] for word in words))
    if stored is None:
        return bits or list(DEFAULT_BITS[backend])
    if bits and bits != [stored]:
        raise ConfigError(
            f"the model is in {stored} bits already: give --bits {stored}, or the model before quantisation"
        )
    return [stored]


def _check_transformers(options: Measure, folder: Path, bits: list[int]) -> None:
    from megatron_ft.checkpoints.folder import is_export
    from megatron_ft.evaluation.measuring.model_folder import check_installed

    if not is_export(folder):
        raise CheckpointError(
            f"{folder}: transformers reads only Hugging Face folders; write one with megatron-to-hf, or give --backend engine"
        )
    if options.adapter:
        raise ConfigError(
            "--adapter needs --backend engine; or write the merged model with merge-adapter and measure that"
        )
    check_installed(bits)


if __name__ == "__main__":
    sys.exit(run_script(COMMAND, run))
