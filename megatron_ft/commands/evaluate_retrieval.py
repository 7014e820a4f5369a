"""megatron-ft evaluate retrieval: how well models find something in long prompts, by length and depth."""

from __future__ import annotations

import json
import sys
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from megatron_ft.commands.in_layout import LAYOUT_FLAGS, Asked, GenerationLayout, in_layout
from megatron_ft.config.cli import Command, run_script
from megatron_ft.config.hints import alternatives, meant
from megatron_ft.config.sections import Processes
from megatron_ft.errors import ConfigError
from megatron_ft.wording import counted

if TYPE_CHECKING:
    from megatron_ft.engine.parallel import Layout
    from megatron_ft.evaluation.retrieval.cases import Grid
    from megatron_ft.evaluation.retrieval.tasks import Task

TASKS = ("key-value", "topics", "lines", "documents")


@dataclass
class RetrievalModels:
    """Models and result"""

    load: list[str] = field(default_factory=list)
    """folders of checkpoints or of exported Hugging Face models; several are compared"""
    names: list[str] = field(default_factory=list)
    """names of the models in --load or --results, in their order; default: the names of the folders in --load, the recorded ones in
    --results"""
    adapter: str | None = None
    """adapters of the one model in --load: a checkpoint of a run with --lora_rank, or a PEFT folder"""
    results: list[str] = field(default_factory=list)
    """instead of --load: files retrieval.json of earlier measurements, to compare their models"""
    output: str = "retrieval"
    """new folder for retrieval.json, answers.jsonl, retrieval.html and the figures"""
    normalisation: Literal["best", "range", "none"] = "best"
    """how scores of a subtask are made comparable before they are averaged: divided by the best model's (best), from the worst to the best
    model (range), unchanged (none)"""
    chat_format: str | None = None
    """chat format of the prompts; default: the one recorded with the model"""
    template_arguments: list[str] = field(default_factory=list)
    """variables for the tokenizer's own chat template, such as enable_thinking=false; values are read as JSON, else as text"""
    bf16: bool = False
    """compute in bfloat16 instead of fp32"""
    verify_checkpoint: bool = True
    """compare the folders' files with their recorded digests, if there are any; --no_verify_checkpoint skips this"""


@dataclass
class RetrievalPrompts:
    """Prompts"""

    tasks: list[str] = field(default_factory=list)
    """tasks, separated by commas: key-value, topics, lines, documents; default: all four"""
    lengths: list[str] = field(default_factory=list)
    """lengths of prompt and answer together, in tokens of each model's tokenizer, separated by commas; default: 2048,4096,8192"""
    depths: int = 5
    """number of places of the answer, evenly spaced from the start of the prompt to its end"""
    samples: int = 10
    """number of prompts for each task, length and depth"""
    seed: int = 0
    """seed of the prompts: the same seed and tokenizer give the same prompts"""
    system: str | None = None
    """system message before each prompt; default: none"""
    topics: str | None = None
    """file of conversations for the task topics, one JSON object per line: {"topic": text, "conversation": text}; default: generated"""
    documents: str | None = None
    """file for the task documents, one JSON object per line: {"title", "text"} with "question" and "answers" where it has them, or
    {"question", "answers", "ctxs"} as Lost in the Middle; default: generated"""
    key_digits: int = 32
    """hexadecimal digits of keys and values of the task key-value; 32: UUIDs"""
    max_new_tokens: int = 100
    """largest number of tokens per answer; a prompt leaves room for them in its length"""
    batch_size: int = 8
    """number of prompts that are answered at once"""
    beyond_positions: bool = False
    """also ask prompts that are longer than the model's positions, to measure a model without RoPE scaling"""


COMMAND = Command(
    name="evaluate retrieval",
    summary="measure retrieval from long prompts, compare models",
    sections=(RetrievalModels, RetrievalPrompts, GenerationLayout, Processes),
    examples=(
        "megatron-ft evaluate retrieval --load runs/alfred --output results/alfred",
        "megatron-ft evaluate retrieval --load runs/linear runs/yarn --names PI YaRN --tasks lines --lengths 2048,8192",
        "megatron-ft evaluate retrieval --results results/linear/retrieval.json results/yarn/retrieval.json --output results/compared",
    ),
    common=(
        "load",
        "names",
        "adapter",
        "results",
        "output",
        "chat_format",
        "tasks",
        "lengths",
        "depths",
        "samples",
        "seed",
        "topics",
        "documents",
        "max_new_tokens",
        "batch_size",
        *LAYOUT_FLAGS,
    ),
)


def run(
    models: RetrievalModels, prompts: RetrievalPrompts, parallel: GenerationLayout, processes: Processes
) -> int | None:
    """Measure, or compare earlier results. Raise UserError for models, files or lengths that do not fit."""
    check(models, prompts)
    if models.results:
        from megatron_ft.evaluation.retrieval.earlier import joined

        _write(models, joined(models.results, models.names))
        return 0
    grid, files = grid_of(prompts), digests_of(prompts)
    from megatron_ft.checkpoints.folder import check_folder

    for given in filter(None, (*models.load, models.adapter)):
        check_folder(Path(given))

    def work(layout: Layout) -> None:
        measured = [_measure(folder, name, models, prompts, grid, layout) for folder, name in _named(models)]
        if layout.is_main:
            _write(models, _described(prompts, grid, files, measured), measured)

    rows, length = prompts.batch_size, grid.lengths[-1]
    asked = [Asked(folder, models.adapter, models.bf16, rows, length) for folder in models.load]
    return in_layout(work, asked, parallel, processes)


def check(models: RetrievalModels, prompts: RetrievalPrompts) -> None:
    """Raise ConfigError for settings that do not go together or are out of range."""
    from megatron_ft.files import check_writable, refuse_existing

    if bool(models.load) == bool(models.results):
        raise ConfigError("give either --load MODEL... or --results FILE...")
    if models.load and models.names and len(models.names) != len(models.load):
        raise ConfigError(
            f"--names has {counted(len(models.names), 'name')} for {counted(len(models.load), 'model')}: give one for each"
        )
    if models.adapter and len(models.load) != 1:
        raise ConfigError("--adapter belongs to one model: give one --load, and compare with --results afterwards")
    if repeated := _repeated(models.names or [name for _, name in _named(models)]):
        raise ConfigError(f"two models have the name {repeated}: give each its own with --names")
    for name in ("depths", "samples", "key_digits", "max_new_tokens", "batch_size"):
        if getattr(prompts, name) < 1:
            raise ConfigError(f"--{name} must be at least 1")
    if unknown := [name for name in tasks_of(prompts) if name not in TASKS]:
        hint = alternatives(unknown[0], TASKS)
        raise ConfigError(f"--tasks {unknown[0]}: is no task; choose from {', '.join(TASKS)}{hint}")
    _check_lengths(prompts)
    check_writable("--output", models.output)
    refuse_existing(models.output)


def _check_lengths(prompts: RetrievalPrompts) -> None:
    if (shortest := lengths_of(prompts)[0]) <= prompts.max_new_tokens:
        raise ConfigError(
            f"--lengths {shortest} leaves no room for a prompt: it must be above --max_new_tokens {prompts.max_new_tokens}"
        )


def tasks_of(prompts: RetrievalPrompts) -> list[str]:
    """Return the names of the tasks, each once."""
    return list(dict.fromkeys(meant(name, TASKS) or name for name in _separate(prompts.tasks) or TASKS))


def lengths_of(prompts: RetrievalPrompts) -> list[int]:
    """Return the lengths, the shortest first. Raise ConfigError if one is no number."""
    given = _separate(prompts.lengths) or ["2048", "4096", "8192"]
    if wrong := [text for text in given if not text.isdecimal()]:
        raise ConfigError(f"--lengths {wrong[0]}: must be whole numbers of tokens, separated by commas")
    return sorted(set(map(int, given)))


def _separate(words: Sequence[str]) -> list[str]:
    """Return the parts of words that are separated by commas or stand alone."""
    return [part for word in words for part in word.replace(" ", "").split(",") if part]


def _named(models: RetrievalModels) -> list[tuple[str, str]]:
    """Return folder and name of each model in --load."""
    return list(zip(models.load, models.names or [Path(each).resolve().name for each in models.load], strict=True))


def _repeated(names: Sequence[str]) -> str | None:
    return next((name for name in names if names.count(name) > 1), None)


def grid_of(prompts: RetrievalPrompts) -> Grid:
    """Return what is asked, with the user's files read. Raise UserError for a file that cannot be used."""
    from megatron_ft.evaluation.retrieval.cases import Grid, depths_of

    return Grid(
        tuple(_task(name, prompts) for name in tasks_of(prompts)),
        tuple(lengths_of(prompts)),
        depths_of(prompts.depths),
        prompts.samples,
        prompts.seed,
    )


def digests_of(prompts: RetrievalPrompts) -> dict[str, str | None]:
    """Return the digest of each file that a task reads, None where it has none."""
    from megatron_ft.files import digest

    read = {name: getattr(prompts, name) if name in tasks_of(prompts) else None for name in ("topics", "documents")}
    return {name: digest(path) if path else None for name, path in read.items()}


def _task(name: str, prompts: RetrievalPrompts) -> Task:
    from megatron_ft.evaluation.retrieval import corpus, tasks

    if name == "key-value":
        return tasks.KeyValues(prompts.key_digits)
    if name == "topics":
        return tasks.Topics(corpus.read_topics(Path(prompts.topics)) if prompts.topics else ())
    if name == "documents":
        return tasks.Documents(corpus.read_documents(Path(prompts.documents)) if prompts.documents else ())
    return tasks.Lines()


def _measure(
    folder: str, name: str, models: RetrievalModels, prompts: RetrievalPrompts, grid: Grid, layout: Layout
) -> dict[str, Any]:
    """Return one model's answers and their summary, the same on all ranks. The model is gone afterwards."""
    from megatron_ft.evaluation.retrieval.ask import allow_lengths, answers
    from megatron_ft.evaluation.retrieval.results import summary
    from megatron_ft.generation.loading import open_chat_model

    model = open_chat_model(
        Path(folder), layout, models.chat_format, models.bf16, models.verify_checkpoint, models.template_arguments,
        Path(models.adapter) if models.adapter else None,
    )  # fmt: skip
    allow_lengths(model, folder, grid.lengths[-1], prompts.beyond_positions)
    rows = answers(model, layout, grid, prompts.system, prompts.max_new_tokens, prompts.batch_size)
    return {"name": name, "load": folder, "adapter": models.adapter, "answers": rows, "tasks": summary(rows)}


def _described(
    prompts: RetrievalPrompts, grid: Grid, files: dict[str, str | None], measured: list[dict[str, Any]]
) -> dict[str, Any]:
    """Return what retrieval.json holds, still without the comparison."""
    asked = {key: getattr(prompts, key) for key in ("seed", "samples", "max_new_tokens", "system", "key_digits")}
    models = [{key: value for key, value in each.items() if key != "answers"} for each in measured]
    return {**asked, **files, "lengths": list(grid.lengths), "depths": list(grid.depths), "models": models}


def _write(models: RetrievalModels, result: dict[str, Any], measured: Sequence[dict[str, Any]] = ()) -> None:
    """Compare the models, write the folder --output, print the table. measured: models with their answers."""
    from megatron_ft.evaluation.retrieval.page import scores_rows, write_page
    from megatron_ft.evaluation.retrieval.results import compared
    from megatron_ft.files import atomic_folder, write_json

    how = models.normalisation
    result = {**result, "normalisation": how, "models": compared(result["models"], how)}
    with atomic_folder(models.output) as folder:
        if measured:
            _write_answers(folder, measured)
        write_json(folder / "retrieval.json", result)
        page = write_page(folder, result)
    head, rows = scores_rows(result["models"])
    print(aligned([head, *rows]))
    print(f"-> {Path(models.output, page.name)}")


def _write_answers(folder: Path, measured: Sequence[dict[str, Any]]) -> None:
    from megatron_ft.files import atomic_file

    with atomic_file(folder / "answers.jsonl", "w") as file:
        for model in measured:
            for row in model["answers"]:
                file.write(json.dumps({"model": model["name"], **row}, ensure_ascii=False) + "\n")


def aligned(rows: Sequence[Sequence[str]]) -> str:
    """Return rows as a table of text: the first column to the left, numbers to the right."""
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    return "\n".join(
        "  ".join([row[0].ljust(widths[0]), *(cell.rjust(width) for cell, width in zip(row[1:], widths[1:]))])
        for row in rows
    )


if __name__ == "__main__":
    sys.exit(run_script(COMMAND, run))
