"""The settings that recur in the converters, and what can be said of them before torch is imported."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

from megatron_ft.config.sections import CkptFormat
from megatron_ft.errors import CheckpointError, DamagedError
from megatron_ft.files import refuse_existing


@dataclass(frozen=True)
class Folders:
    """From where to where"""

    input_dir: str = field(metadata={"required": True})
    """What to convert."""
    output_dir: str = field(metadata={"required": True})
    """What to make."""


@dataclass(frozen=True)
class Written:
    """How the result is written"""

    params_dtype: Literal["fp32", "bf16", "fp16"] | None = None
    """Type of the weights; default: as in the source."""
    overwrite: bool = False
    """Replace an earlier conversion in output_dir."""


@dataclass(frozen=True)
class CheckpointFormat:
    """The format of a checkpoint to make"""

    ckpt_format: CkptFormat = "torch_dist"
    """torch_dist: megatron-core's own, loads into any layout. torch: one mp_rank file a rank, for this layout only."""
    make_vocab_size_divisible_by: int = 128
    """The embedding gets rows of zeros up to a multiple of this times the tensor parallel size."""


@dataclass(frozen=True)
class CheckpointSource:
    """Which checkpoint to read"""

    iteration: str | None = None
    """Iteration to take, or release; default: the one latest_checkpointed_iteration.txt names."""
    tokenizer: str | None = None
    """For Megatron-LLM's files, which hold none: tokenizer.model, tokenizer.json or a folder."""
    true_vocab_size: int | None = None
    """For Megatron-LLM's files without a tokenizer: rows of the embedding that stand for a token."""
    verify_checkpoint: bool = True
    """Compare the files that are read with their digests, where the folder has them; --no_verify_checkpoint skips this."""


def check_source(folder: str | Path, check: bool) -> None:
    """Compare a folder with its digests.json, where it has one. Raises DamagedError naming the first file that is unlike."""
    from megatron_ft.digests import check_digests, has_digests

    if check and has_digests(Path(folder)):
        try:
            check_digests(Path(folder))
        except DamagedError as error:
            raise DamagedError(f"{error} (changed on purpose? --no_verify_checkpoint)") from error


def note_sizes(options: CheckpointFormat, tp_size: int, pp_size: int) -> None:
    """Log that sizes cut nothing in a checkpoint that any layout loads."""
    from megatron_ft.log import logger

    if options.ckpt_format == "torch_dist" and (tp_size, pp_size) != (1, 1):
        logger("conversion").info(
            f"TP {tp_size} x PP {pp_size} is recorded only: a torch_dist checkpoint loads into any layout; for one mp_rank file a rank "
            f"add --ckpt_format torch"
        )


def check_folders(options: Folders, overwrite: bool, ours: set[str], marker: str) -> None:
    """Refuse a source that is not there, and to write where something would be lost.

    An existing folder is replaced only with --overwrite, and then only one that an earlier conversion made: it holds
    `marker`, and nothing beyond the names in `ours` (empty: any). Raises UserError.
    """
    input_dir, output_dir = Path(options.input_dir), Path(options.output_dir)
    if not input_dir.is_dir():
        raise CheckpointError(f"--input_dir {input_dir}: no such folder; give the folder to convert")
    source, target = input_dir.resolve(), output_dir.resolve()
    if target == source or source.is_relative_to(target) or target.is_relative_to(source):
        raise CheckpointError(
            f"--output_dir {output_dir} and --input_dir {input_dir} lie in each other: choose another"
        )
    if not overwrite:
        refuse_existing(output_dir)
    elif output_dir.is_dir() and any(output_dir.iterdir()):
        strange = sorted(p.name for p in output_dir.iterdir() if ours and p.name not in ours)
        if strange or not (output_dir / marker).exists():
            what = f"holds {strange[0]}" if strange else f"has no {marker}"
            raise CheckpointError(
                f"{output_dir} {what}, so no earlier conversion made it and --overwrite leaves it alone: choose another"
            )
