"""megatron-ft evaluate perplexity: perplexity of models by length of the context, over the same tokens."""

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
class PerplexityOptions(ComparedModels):
    """Models and texts"""

    lengths: list[int] = field(default_factory=lambda: [512, 1024, 2048])
    """largest numbers of tokens in a window, separated by commas: those scored and the context before them"""
    stride: int | None = None
    """number of tokens that a window scores, below the smallest length; default: half of that length"""
    batch_size: int = 8
    """number of windows that are computed at once"""
    output: str = field(default="perplexity", metadata={"writes": "folder"})
    """folder for perplexity.json, perplexity.html and perplexity.svg"""


COMMAND = Command(
    name="evaluate perplexity",
    summary="perplexity of models by length of the context",
    sections=(PerplexityOptions, GenerationLayout, Processes),
    examples=(
        "megatron-ft evaluate perplexity --load runs/tuned --data data/mine-val --lengths 512,1024,2048",
        "megatron-ft evaluate perplexity --load runs/scaled runs/plain --names scaled unscaled "
        "--data book.txt --lengths 512,1024,2048,4096,8192,12000 --tensor_model_parallel_size 2 --pipeline_model_parallel_size 2",
    ),
    common=("load", "names", "adapter", "data", "bf16", "lengths", "stride", "batch_size", "output", *LAYOUT_FLAGS),
)


def run(options: PerplexityOptions, parallel: GenerationLayout, processes: Processes) -> int:
    """Measure, print a table and write the files. Raise UserError for settings, models or texts that do not fit."""
    stride = check(options)
    return compare_models(
        options,
        lambda load, adapter, layout: _measured(options, load, adapter, stride, layout),
        lambda models: _write(options, stride, models),
        options.batch_size, options.lengths[-1], parallel, processes,
    )  # fmt: skip


def check(options: PerplexityOptions) -> int:
    """Return the stride. Raise ConfigError for settings that do not fit."""
    check_models(options)
    if not options.lengths or min(options.lengths) < 2 or sorted(set(options.lengths)) != options.lengths:
        raise ConfigError("--lengths must be at least 2 and in rising order, such as 512,1024,2048")
    if options.batch_size < 1:
        raise ConfigError("--batch_size must be at least 1")
    stride = options.lengths[0] // 2 if options.stride is None else options.stride
    if not 0 < stride < options.lengths[0]:
        raise ConfigError(
            f"--stride {stride} must be at least 1 and below the smallest length, {options.lengths[0]}, so that every length scores "
            f"the same tokens: lower it, or leave it out"
        )
    return stride


def _measured(
    options: PerplexityOptions, load: str, adapter: str | None, stride: int, layout: Layout
) -> dict[str, Any]:
    """Return the positions of one model and its sums at every length."""
    from megatron_ft.evaluation.documents import read_documents
    from megatron_ft.evaluation.perplexity import measure
    from megatron_ft.evaluation.scoring import Scorer
    from megatron_ft.generation.loading import open_chat_model
    from megatron_ft.models.rope import LENGTH_METHODS, method_of

    chat = open_chat_model(
        Path(load), layout, None, options.bf16, options.verify_checkpoint, (), Path(adapter) if adapter else None
    )
    model = chat.decoder.model
    documents = read_documents(options.data, chat.tokenizer, model.true_vocab_size)
    pads = method_of(model.rotary_pos_emb.arch.rope_scaling) not in LENGTH_METHODS
    found = []
    for length in options.lengths:
        sums = measure(Scorer(model, layout), documents, length, stride, layout, options.batch_size, pads)
        parts = {
            kind: {name: one.as_json() for name, one in sorted(getattr(sums, kind).items())}
            for kind in ("roles", "sources")
        }
        found.append({"length": length, "stride": stride, **sums.all.as_json(), **parts})
    return {"positions": chat.decoder.max_positions, "lengths": found}


def _write(options: PerplexityOptions, stride: int, models: list[dict[str, Any]]) -> None:
    from megatron_ft.files import write_json
    from megatron_ft.report.perplexity_page import beyond, how, named_rows, write_page

    folder = Path(options.output)
    folder.mkdir(parents=True, exist_ok=True)
    precision = "bf16" if options.bf16 else "fp32"
    result = {
        "data": options.data,
        "lengths": options.lengths,
        "stride": stride,
        "precision": precision,
        "models": models,
    }
    write_json(folder / "perplexity.json", result)
    write_page(result, folder / "perplexity.html", folder / "perplexity.svg")
    print(f"Perplexity. {how(result)}")
    rows = [row for kind in (None, "roles", "sources") for row in named_rows(models, kind)]
    width = max(len(name) for name, _ in rows)
    print(f"{'window':{width}}" + "".join(f"{length:>14}" for length in options.lengths))
    for name, values in rows:
        print(f"{name:{width}}" + "".join(f"{value:>14}" for value in values))
    if star := beyond(models):
        print(star)
    print(folder / "perplexity.html")


if __name__ == "__main__":
    sys.exit(run_script(COMMAND, run))
