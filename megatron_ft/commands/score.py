"""megatron-ft score: store a teacher's most likely tokens at every place of shards, from which finetune --teacher_logits distils."""

from __future__ import annotations

import sys
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from megatron_ft.commands.in_layout import LAYOUT_FLAGS, Asked, GenerationLayout, in_layout
from megatron_ft.config.checks import positive
from megatron_ft.config.cli import Command, run_script
from megatron_ft.config.sections import Processes
from megatron_ft.errors import ConfigError, DataError, UserError
from megatron_ft.wording import counted, size

if TYPE_CHECKING:
    from megatron_ft.data.loader import Samples
    from megatron_ft.data.unfinished_logits import Unfinished
    from megatron_ft.engine.parallel import Layout


@dataclass
class Score:
    """Teacher and shards"""

    load: str = field(default="", metadata={"required": True})
    """teacher: folder of a checkpoint or of an exported Hugging Face model"""
    data_path: list[str] = field(default_factory=list, metadata={"required": True})
    """prefixes of the shards to score, one or more, of every kind that finetune takes"""
    output: list[str] = field(default_factory=list)
    """prefixes to write to (PREFIX-teacher.bin, PREFIX-teacher.json), one for each --data_path; default: beside the shards"""
    top_k: int = 64
    """number of most likely tokens that are stored for each token; the others are stored as one probability"""
    seq_length: int = 4096
    """tokens per row of the run that will read them; longer samples are treated as there"""
    over_long: Literal["cut", "drop", "split"] = "cut"
    """what that run does with longer samples"""
    kd_temperature: float = 1.0
    """temperature of the KL divergence of that run"""
    batch_size: int = 8
    """number of samples that are computed at once"""
    bf16: bool = False
    """compute in bfloat16 instead of fp32"""
    verify_checkpoint: bool = True
    """compare the teacher's files with their digests before loading it; --no_verify_checkpoint skips this"""


COMMAND = Command(
    name="score",
    summary="store a teacher's likely tokens, for distillation",
    sections=(Score, GenerationLayout, Processes),
    examples=(
        "megatron-ft score --load runs/teacher --data_path data/chats-train data/chats-val --top_k 64 "
        "--seq_length 4096 --tensor_model_parallel_size 2 --pipeline_model_parallel_size 2",
    ),
    common=(
        "load",
        "data_path",
        "output",
        "top_k",
        "seq_length",
        "over_long",
        "kd_temperature",
        "batch_size",
        "bf16",
        *LAYOUT_FLAGS,
    ),
)


def run(options: Score, parallel: GenerationLayout, processes: Processes) -> int:
    """Score all shards. Raise UserError for a teacher or shards that do not fit."""
    check(options)
    from megatron_ft.checkpoints.folder import check_folder
    from megatron_ft.data.verify import verify_shards
    from megatron_ft.engine.parallel import local_rank
    from megatron_ft.files import check_writable

    check_folder(Path(options.load))
    outputs = options.output or options.data_path
    for prefix in outputs:
        check_writable("--output", Path(prefix).absolute().parent)
    several = [_open(prefix) for prefix in options.data_path]
    if local_rank() == 0:
        verify_shards(several, "nothing")
    asked = [Asked(options.load, None, options.bf16, options.batch_size, options.seq_length)]
    return in_layout(lambda layout: _score(options, several, outputs, layout), asked, parallel, processes)


def _open(prefix: str) -> Samples:
    """Open shards of any kind that finetune takes. Those of other tools learn the vocabulary from the teacher."""
    from megatron_ft.data.foreign import open_any
    from megatron_ft.data.plain import PlainShards, is_plain

    return PlainShards(prefix, 1 << 31) if is_plain(prefix) else open_any(prefix)


def _fit(shards: Any, tokenizer: dict[str, Any], vocab_size: int) -> None:
    """Raise DataError unless the shards have the teacher's tokens, as far as their tool says which they have."""
    from megatron_ft.data.foreign import ForeignShards, compare_special
    from megatron_ft.data.manifest import check_tokenizer
    from megatron_ft.data.shards import Shards

    if isinstance(shards, Shards):
        check_tokenizer(shards.manifest, tokenizer, vocab_size, shards.prefix)
        return
    shards.vocab_size = vocab_size
    if isinstance(shards, ForeignShards):
        compare_special(shards, tokenizer)


def check(options: Score) -> None:
    positive(options, "top_k", "seq_length", "batch_size")
    if not options.data_path:
        raise ConfigError("--data_path is needed: prefixes of shards to score")
    if options.output and len(options.output) != len(options.data_path):
        raise ConfigError(
            f"--output has {counted(len(options.output), 'prefix')} for {len(options.data_path)} --data_path: give one for each"
        )
    if not 0 < options.kd_temperature < float("inf"):
        raise ConfigError(f"--kd_temperature {options.kd_temperature:g}: must be above 0")


def _score(options: Score, several: list[Samples], outputs: list[str], layout: Layout) -> None:
    from megatron_ft.adapters.base import weight_hashes
    from megatron_ft.evaluation.top_k import TopScorer
    from megatron_ft.generation.loading import open_bare
    from megatron_ft.training.datasets import rope_of

    model, arch, tokenizer = open_bare(Path(options.load), layout, options.bf16, options.verify_checkpoint)
    if options.top_k > arch.vocab_size:
        raise ConfigError(f"--top_k {options.top_k} is more than the vocabulary's {arch.vocab_size}: lower it")
    if options.seq_length > arch.max_position_embeddings:
        raise ConfigError(
            f"--seq_length {options.seq_length} is beyond the teacher's {arch.max_position_embeddings} positions: lower it"
        )
    for shards in several:
        _fit(shards, tokenizer, arch.vocab_size)
    described = {
        "teacher": {"path": str(Path(options.load).resolve()), "weights": weight_hashes([model], arch)},
        "tokenizer": tokenizer.get("fingerprint"), "rope": rope_of(arch), "size": [arch.num_layers, arch.hidden_size],
        "vocab_size": arch.vocab_size, "top_k": options.top_k, "seq_length": options.seq_length,
        "over_long": options.over_long, "temperature": float(options.kd_temperature),
        "precision": "bf16" if options.bf16 else "fp32",
    }  # fmt: skip
    scorer = TopScorer(model, layout, options.top_k, options.kd_temperature)
    for shards, output in zip(several, outputs, strict=True):
        _score_one(options, scorer, shards, output, described, layout)


def _score_one(
    options: Score, scorer: Any, shards: Any, output: str, described: dict[str, Any], layout: Layout
) -> None:
    """Write the rows that an earlier run has not written, then their description. Keep what is done for the next run, whatever ends it."""
    import numpy as np
    import torch.distributed as dist

    from megatron_ft.data.pieces import pieces_of
    from megatron_ft.data.teacher_logits import row_type
    from megatron_ft.engine.collective_errors import raise_together
    from megatron_ft.evaluation.top_k import places_of, score_pieces

    kind = row_type(options.top_k, described["vocab_size"])
    pieces = pieces_of(np.asarray(shards.lengths), options.seq_length, options.over_long)
    unfinished, done = None, None
    problem: Exception | None = None
    if layout.is_main:
        try:
            unfinished, done = _begun(output, shards, described, kind, pieces, places_of(shards, pieces))
        except (UserError, OSError) as error:
            problem = error
    raise_together(problem)
    shared: list[Any] = [done, unfinished and unfinished.rows]
    dist.broadcast_object_list(shared, src=0)
    done, rows = shared
    if rows is None:
        return
    try:
        left = np.setdiff1d(np.arange(len(pieces)), done)
        score_pieces(scorer, shards, rows, kind, pieces, left, options.batch_size)
        dist.barrier()
        if unfinished:
            unfinished.finish()
            print(_written(output, unfinished.described["tokens"], kind.itemsize))
    except DataError:  # of the shards: no run could finish
        if unfinished:
            unfinished.discard()
        raise
    finally:
        if unfinished:
            unfinished.close()
    dist.barrier()


def _begun(
    output: str, shards: Any, described: dict[str, Any], kind: Any, pieces: Any, places: Any
) -> tuple[Unfinished | None, Any]:
    """Return the folder to go on in and the pieces that are done; (None, None) if all is there. For the main rank."""
    from megatron_ft.data.teacher_logits import digest_of_tokens, is_finished, rows_of, rows_path
    from megatron_ft.data.unfinished_logits import Unfinished

    content = {**described, "shards": digest_of_tokens(shards), "tokens": rows_of(shards)}
    if is_finished(output, content):
        print(f"{rows_path(output)}: is there already, made so from these shards by this teacher")
        return None, None
    rows_path(output).parent.mkdir(parents=True, exist_ok=True)
    unfinished = Unfinished(output, content, kind)
    done = unfinished.begin(pieces, places)
    if len(done):
        print(f"{rows_path(output)}: going on, {len(done):,} of {len(pieces):,} pieces are there")
    return unfinished, done


def _written(output: str, tokens: int, each: int) -> str:
    from megatron_ft.data.teacher_logits import rows_path

    return f"{rows_path(output)}: {counted(tokens, 'token')}, {counted(each, 'byte')} each, {size(tokens * each)}"


if __name__ == "__main__":
    sys.exit(run_script(COMMAND, run))
