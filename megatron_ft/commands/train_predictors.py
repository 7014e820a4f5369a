"""megatron-ft train-predictors: train predictors of a ReLU model's activations, for generate --sparse predicted."""

from __future__ import annotations

import sys
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING

from megatron_ft.config.cli import Command, run_script
from megatron_ft.errors import ConfigError

if TYPE_CHECKING:
    from megatron_ft.engine.parallel import Layout
    from megatron_ft.sparse.fitting import Quality


@dataclass
class TrainPredictors:
    """Model, texts and predictors"""

    load: str = field(default="", metadata={"required": True})
    """folder of a checkpoint or of an exported Hugging Face model, with ReLU"""
    data: list[str] = field(default_factory=list)
    """prefixes of shards, whose samples are documents, or text files, each of them one document"""
    output: str = field(default="", metadata={"required": True, "writes": "folder"})
    """new folder for the predictors"""
    rank: int = 512
    """rows of a predictor's first matrix; a sixteenth of the hidden size costs little"""
    recall: float = 0.98
    """share of the active rows that a predictor has to find among those it is trained on; higher: more rows are read"""
    tokens: int = 20_000
    """number of tokens that are read; a fifth of them only measures"""
    seq_length: int = 512
    """number of tokens of a row"""
    steps: int = 300
    """steps of training for each layer; 0: only the low-rank approximation"""
    seed: int = 0
    """seed of the choice of rows and of training"""
    verify_checkpoint: bool = True
    """compare the folder's files with their recorded digests, if there are any; --no_verify_checkpoint skips this"""


COMMAND = Command(
    name="train-predictors",
    summary="train predictors of zero activations for sparse decoding",
    sections=(TrainPredictors,),
    examples=(
        "megatron-ft train-predictors --load runs/relu --data data/mine-val --rank 512 --output runs/predictors",
    ),
)


def run(options: TrainPredictors) -> int:
    """Train, write the predictors, print recall and the change of perplexity. Raise UserError for what does not fit."""
    check(options)
    from megatron_ft.commands.sparse_options import check_one_process
    from megatron_ft.config.sections import Processes
    from megatron_ft.engine.parallel import ParallelSizes, process_groups
    from megatron_ft.files import refuse_existing
    from megatron_ft.generation.sparse_loading import described

    check_one_process(Processes())
    known = described(Path(options.load))
    least = min(known.arch.hidden_size, known.arch.ffn_hidden_size)
    if options.rank > least:
        raise ConfigError(f"--rank {options.rank} is more than the model's matrices have, {least}: lower it")
    refuse_existing(options.output)
    with process_groups(ParallelSizes(1, 1)) as layout:
        _train(options, layout)
    return 0


def check(options: TrainPredictors) -> None:
    """Raise ConfigError for values out of range."""
    if not options.data:
        raise ConfigError("--data is needed: prefixes of shards or text files")
    if min(options.rank, options.tokens) < 1 or options.seq_length < 2 or options.steps < 0:
        raise ConfigError("--rank and --tokens must be at least 1, --seq_length at least 2, --steps at least 0")
    if not 0 < options.recall < 1:
        raise ConfigError("--recall must be above 0 and below 1: to find every active row takes all rows")


def _train(options: TrainPredictors, layout: Layout) -> None:
    from megatron_ft.evaluation.documents import read_documents
    from megatron_ft.evaluation.predicting import cut, perplexity, train
    from megatron_ft.generation.loading import open_chat_model
    from megatron_ft.generation.sparse_loading import described
    from megatron_ft.sparse.fitting import Fitting
    from megatron_ft.sparse.model import firsts_digest, make_sparse
    from megatron_ft.sparse.predictor_files import write_predictors

    known = described(Path(options.load))
    chat = open_chat_model(
        Path(options.load), layout, bf16=known.precision == "bf16", digests=options.verify_checkpoint
    )
    model = chat.decoder.model
    length = min(options.seq_length, known.arch.max_position_embeddings)
    documents = read_documents(options.data, chat.tokenizer, model.true_vocab_size)
    text = cut(documents, length, options.tokens, options.seed)
    how = Fitting(options.rank, options.recall, options.steps, seed=options.seed)
    layers, qualities = train(model, layout, known.arch, text, how, _tell)
    bound = firsts_digest(model, known.arch)
    before = perplexity(model, layout, text.held_out)
    sparse = make_sparse(model, known.arch, known.precision)
    sparse.predict_with(layers, "bf16")
    sparse.mode = "predicted"
    after = perplexity(model, layout, text.held_out)
    print(summary(qualities, before, after, text.held_out.numel()))
    recorded = {
        "rank": options.rank, "recall": options.recall, "tokens": text.train.numel(), "seq_length": length,
        "data": [Path(place).name for place in options.data], "perplexity": {"all_rows": before, "predicted": after},
    }  # fmt: skip
    write_predictors(options.output, layers, bound, qualities, recorded)
    print(options.output)


def _tell(number: int, one: Quality) -> None:
    print(
        f"layer {number}: {100 * one.active:.1f}% active, {100 * one.rows:.1f}% predicted, recall {100 * one.recall:.1f}%, "
        f"of their squares {100 * one.weight:.1f}%",
        flush=True,
    )


def summary(qualities: list[Quality], before: float, after: float, tokens: int) -> str:
    """Return what is printed at the end, of held-out rows."""
    count = len(qualities)
    active, rows, recall = (
        100 * sum(getattr(one, name) for one in qualities) / count for name in ("active", "rows", "recall")
    )
    return (
        f"all layers, {tokens:,} tokens that were not trained on: {active:.1f}% active, {rows:.1f}% predicted, recall {recall:.1f}%\n"
        f"perplexity with all rows {before:.4f}, with predicted rows {after:.4f} ({100 * (after / before - 1):+.2f}%)"
    )


if __name__ == "__main__":
    sys.exit(run_script(COMMAND, run))
