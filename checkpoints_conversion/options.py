"""The settings that the converters share, and their checks that need no torch."""

from __future__ import annotations

from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import Any, Literal

from megatron_ft.config.sections import CkptFormat
from megatron_ft.errors import CheckpointError, DamagedError
from megatron_ft.files import refuse_existing


@dataclass(frozen=True)
class Folders:
    """Source and result"""

    input_dir: str = field(metadata={"required": True})
    """Folder to convert."""
    output_dir: str = field(metadata={"required": True, "writes": "folder"})
    """Folder of the result."""


@dataclass(frozen=True)
class Written:
    """Writing of the result"""

    params_dtype: Literal["fp32", "bf16", "fp16"] | None = None
    """Data type of the written weights; default: that of the source."""
    overwrite: bool = False
    """Replace an earlier conversion in output_dir; other folders are never replaced."""


@dataclass(frozen=True)
class CheckpointFormat:
    """Format of the new checkpoint"""

    ckpt_format: CkptFormat = "torch_dist"
    """Checkpoint format; torch_dist: megatron-core's, loads into any layout; torch: one mp_rank file per rank, only for this layout."""
    make_vocab_size_divisible_by: int = 128
    """Pad the embedding with rows of zeros to a multiple of this number times the tensor parallel size."""


@dataclass(frozen=True)
class CheckpointSource:
    """Checkpoint to read"""

    iteration: str | None = None
    """Iteration to read, a number or release; default: the one in latest_checkpointed_iteration.txt."""
    tokenizer: str | None = None
    """Tokenizer of a Megatron-LLM checkpoint, which contains none: a tokenizer.model, a tokenizer.json or a folder."""
    true_vocab_size: int | None = None
    """Vocabulary size without padding, for a Megatron-LLM checkpoint without --tokenizer."""
    rope_theta: float | None = None
    """Base of the rotary embedding, for a Megatron-LLM checkpoint that lost it (its sharding tool records 10000)."""
    layernorm_epsilon: float | None = None
    """Epsilon of the norms, for a Megatron-LLM checkpoint that lost it (its sharding tool records 1e-5)."""
    rope_scaling_factor: float | None = None
    """Factor of the linear RoPE scaling, for a Megatron-LLM checkpoint that lost it (its sharding tool records 1)."""
    verify_checkpoint: bool = True
    """Compare the files that are read with their recorded digests, if there are any; --no_verify_checkpoint skips this."""


@dataclass(frozen=True)
class Recommended:
    """Model card"""

    system: str | None = None
    """System message that the model card recommends: in its example of a prompt, and in that of its use."""


@dataclass(frozen=True)
class Export(Recommended, CheckpointSource, Written, Folders):
    """Source and result"""


@dataclass(frozen=True)
class QuantisedExport(Export):
    """Source and result"""

    quantize: Literal["gptq", "w4a16", "nf4", "int8", "gguf-f16", "gguf-q8_0"] | None = None
    """Quantise the weights. gptq and w4a16: linears of the layers, by GPTQ with --calibration, in the format of GPTQ or compressed-tensors;
    nf4, int8: as bitsandbytes stores them; gguf-f16, gguf-q8_0: a file for llama.cpp."""
    bits: int = 4
    """With --quantize gptq: bits of a weight: 2, 4 or 8."""
    group_size: int = 32
    """With --quantize gptq or w4a16: columns of a row that share a scale."""
    desc_act: bool = False
    """With --quantize gptq: groups are columns that are rounded one after the other, not neighbours: smaller errors, slower kernels.
    (The columns with the largest inputs are rounded first in any case, and groups of w4a16 are neighbours.)"""
    calibration: str | None = None
    """With --quantize: prefix of shards. gptq and w4a16 measure the inputs of each layer with its tokens; of the last rows, which are held
    out, the model card states the perplexity before and after, in every format."""
    calibration_rows: int = 128
    """With --quantize: rows of tokens to calibrate with, at most; a quarter more are held out."""
    calibration_length: int = 2048
    """With --quantize: tokens of a row."""


def stated_of(source: CheckpointSource) -> dict[str, Any]:
    """Return how a checkpoint is read, for another process: by its own folder, and not compared with its digests again."""
    stated = {one.name: getattr(source, one.name) for one in fields(CheckpointSource)}
    return stated | {"verify_checkpoint": False, "iteration": None}


def check_source(folder: str | Path, check: bool) -> None:
    """Compare a folder with its digests.json, if it has one. Raise DamagedError with the first file that differs."""
    from megatron_ft.digests import check_digests, has_digests

    if check and has_digests(Path(folder)):
        try:
            check_digests(Path(folder))
        except DamagedError as error:
            raise DamagedError(f"{error} (if it was changed on purpose, add --no_verify_checkpoint)") from error


def note_sizes(options: CheckpointFormat, tp_size: int, pp_size: int) -> None:
    """Log that the sizes do not split a checkpoint in torch_dist format."""
    from megatron_ft.log import logger

    if options.ckpt_format == "torch_dist" and (tp_size, pp_size) != (1, 1):
        logger("conversion").info(
            f"TP {tp_size} x PP {pp_size} is only recorded: a torch_dist checkpoint loads into any layout; for one mp_rank file per rank "
            f"add --ckpt_format torch"
        )


def check_folders(options: Folders, overwrite: bool, ours: set[str], marker: str) -> None:
    """Check that the source exists and that writing destroys nothing. Raise UserError.

    An existing folder is replaced only with --overwrite, and only if an earlier conversion made it: it contains `marker`, and nothing
    but the names in `ours` (empty: any names).
    """
    input_dir, output_dir = Path(options.input_dir), Path(options.output_dir)
    if not input_dir.is_dir():
        raise CheckpointError(f"--input_dir {input_dir}: no such folder; give the folder to convert")
    source, target = input_dir.resolve(), output_dir.resolve()
    if target == source or source.is_relative_to(target) or target.is_relative_to(source):
        raise CheckpointError(
            f"--output_dir {output_dir} and --input_dir {input_dir} are the same folder or inside each other: choose another --output_dir"
        )
    if not overwrite:
        refuse_existing(output_dir)
    elif output_dir.is_dir() and any(output_dir.iterdir()):
        strange = sorted(p.name for p in output_dir.iterdir() if ours and p.name not in ours)
        if strange or not (output_dir / marker).exists():
            what = f"holds {strange[0]}" if strange else f"has no {marker}"
            raise CheckpointError(
                f"{output_dir} {what}, so it is not an earlier conversion and --overwrite does not replace it: choose another folder"
            )
