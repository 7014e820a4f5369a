"""megatron-ft evaluate sparsity: share of zeros in the MLPs of models, by layer, over the same texts."""

from __future__ import annotations

import sys
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from megatron_ft.commands.compared_models import ComparedModels, check_models, compare_models
from megatron_ft.commands.in_layout import LAYOUT_FLAGS, GenerationLayout
from megatron_ft.config.cli import Command, run_script
from megatron_ft.config.sections import Processes
from megatron_ft.errors import ConfigError

if TYPE_CHECKING:
    from megatron_ft.engine.parallel import Layout


@dataclass
class SparsityOptions(ComparedModels):
    """Models and texts"""

    length: int = 512
    """number of tokens of a document that are computed together; they see each other"""
    max_tokens: int | None = None
    """stop after about this many tokens; default: all of the texts"""
    batch_size: int = 8
    """number of pieces of documents that are computed at once"""
    output: str = field(default="sparsity", metadata={"writes": "folder"})
    """folder for sparsity.json, sparsity.html and sparsity.svg"""


COMMAND = Command(
    name="evaluate sparsity",
    summary="share of zeros in the MLPs of models, by layer",
    sections=(SparsityOptions, GenerationLayout, Processes),
    examples=(
        "megatron-ft evaluate sparsity --load runs/relu --data data/mine-val",
        "megatron-ft evaluate sparsity --load falcon-40b runs/relu-falcon-40b --names gelu relu "
        "--data book.txt --max_tokens 100000 --tensor_model_parallel_size 2 --pipeline_model_parallel_size 2",
    ),
    common=("load", "names", "adapter", "data", "bf16", "length", "max_tokens", "batch_size", "output", *LAYOUT_FLAGS),
)


def run(options: SparsityOptions, parallel: GenerationLayout, processes: Processes) -> int:
    """Measure, print a table and write the files. Raise UserError for settings, models or texts that do not fit."""
    check(options)
    return compare_models(
        options,
        lambda load, adapter, layout: _measured(options, load, adapter, layout),
        lambda models: _write(options, models),
        options.batch_size, options.length, parallel, processes,
    )  # fmt: skip


def check(options: SparsityOptions) -> None:
    """Raise ConfigError for settings that do not fit."""
    check_models(options)
    for name in ("length", "batch_size", "max_tokens"):
        value = getattr(options, name)
        if value is not None and value < 1:
            raise ConfigError(f"--{name} {value}: must be at least 1")


def _measured(options: SparsityOptions, load: str, adapter: str | None, layout: Layout) -> dict[str, Any]:
    """Return the activation of one model and what was found."""
    from megatron_ft.evaluation.documents import read_documents
    from megatron_ft.evaluation.sparsity import measure, pieces
    from megatron_ft.generation.loading import open_chat_model
    from megatron_ft.models.rope import LENGTH_METHODS, method_of

    chat = open_chat_model(
        Path(load), layout, None, options.bf16, options.verify_checkpoint, (), Path(adapter) if adapter else None
    )
    model = chat.decoder.model
    arch = model.rotary_pos_emb.arch
    documents = read_documents(options.data, chat.tokenizer, model.true_vocab_size)
    windows = pieces([len(one.ids) for one in documents], options.length, options.max_tokens)
    pads = method_of(arch.rope_scaling) not in LENGTH_METHODS
    found = measure(model, documents, windows, layout, options.batch_size, pads)
    return {"activation": arch.activation, **found.as_json()}


def _write(options: SparsityOptions, models: list[dict[str, Any]]) -> None:
    from megatron_ft.files import write_json
    from megatron_ft.models.sparsity import NEAR
    from megatron_ft.report.sparsity_page import HEAD, how, rows, write_page

    folder = Path(options.output)
    folder.mkdir(parents=True, exist_ok=True)
    precision = "bf16" if options.bf16 else "fp32"
    result = {
        "data": options.data, "length": options.length, "max_tokens": options.max_tokens, "precision": precision, "near": NEAR,
        "models": models,
    }  # fmt: skip
    write_json(folder / "sparsity.json", result)
    write_page(result, folder / "sparsity.html", folder / "sparsity.svg")
    print(how(result))
    lines = [HEAD, *rows(models)]
    widths = [max(len(line[column]) for line in lines) for column in range(len(HEAD))]
    for line in lines:
        print("  ".join(f"{cell:{'<' if n < 2 else '>'}{width}}" for n, (cell, width) in enumerate(zip(line, widths))))
    print(folder / "sparsity.html")


if __name__ == "__main__":
    sys.exit(run_script(COMMAND, run))
