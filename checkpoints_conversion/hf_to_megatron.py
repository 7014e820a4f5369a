"""A Hugging Face model to a Megatron checkpoint, cut for tensor and pipeline parallelism."""

from __future__ import annotations

import sys
import time
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Literal

from checkpoints_conversion.options import CheckpointFormat, Folders, Written, check_folders, check_source, note_sizes
from megatron_ft.checkpoints.folder import TRACKER
from megatron_ft.config.cli import Command, run_script
from megatron_ft.config.model_parallel import ModelParallel
from megatron_ft.config.sections import RopeScaling
from megatron_ft.errors import ConfigError

if TYPE_CHECKING:
    from torch import Tensor

    from checkpoints_conversion.report import Report
    from checkpoints_conversion.vocabulary import Noise
    from megatron_ft.checkpoints.folder import CheckpointConfig
    from megatron_ft.data.tokenizer import Tokenizer
    from megatron_ft.models.hf_source import HfSource
    from megatron_ft.models.weights import Placed


@dataclass(frozen=True)
class HfToMegatron(Written, CheckpointFormat, ModelParallel, Folders):
    """What to convert, and into what"""

    input_dir: str = field(metadata={"required": True})
    """Hugging Face model folder: config.json, safetensors, tokenizer files."""
    output_dir: str = field(metadata={"required": True})
    """Checkpoint to make; finetune takes it as --load."""
    tokenizer_type: str | None = None
    """As in pretokenize: SentencePieceTokenizer puts Megatron's own five tokens before the extra ones, so that ids equal
    those of shards made with it."""
    vocab_extra_ids_list: str | None = None
    """Tokens to add, comma-separated, such as "<|im_start|>,<|im_end|>"."""
    new_rows: Literal["mean", "noise"] = "mean"
    """Rows of added tokens: the mean of the old ones, or that and seeded noise, which tells them apart from the start."""
    new_rows_std: float | None = None
    """Standard deviation of the noise; default: initializer_range of the model's config.json, else 0.02."""
    new_rows_seed: int = 1234
    """Seed of the noise: the same rows in every layout and format."""
    chat_format: str | None = None
    """Chat format to record (chatml), for generate, chat and the exported template; its tokens are added."""
    rope_scaling_type: RopeScaling = "linear"
    """How --rope_scaling_factor stretches the context."""
    rope_scaling_factor: float = 1.0
    """Stretch the context this many times: recorded in the checkpoint, for training, generation and export. 1: not."""
    tokenizer: str | None = None
    """tokenizer.model, tokenizer.json or a folder; default: the model folder's."""
    verify_checkpoint: bool = True
    """Compare the source's files with its digests, where it has them (our exports do); --no_verify_checkpoint skips this."""
    plan: bool = False
    """Only list the files and tensors that would be written, exact to the byte; needs config.json, no weights."""


COMMAND = Command(
    name="hf-to-megatron",
    summary="a Hugging Face model to a checkpoint split for tensor and pipeline parallelism",
    sections=(HfToMegatron,),
    examples=(
        "megatron-ft hf-to-megatron llama2-70b checkpoints/llama2-70b-tp8-pp4 "
        "--tensor_model_parallel_size 8 --pipeline_model_parallel_size 4 --ckpt_format torch --chat_format chatml",
        "megatron-ft hf-to-megatron mistral-7b checkpoints/mistral-7b-32k "
        "--rope_scaling_type yarn --rope_scaling_factor 4",
    ),
    positional=("input_dir", "output_dir"),
)


def run(options: HfToMegatron) -> None:
    print(planned(options) if options.plan else convert(options))


def planned(options: HfToMegatron) -> str:
    """What convert would write; every token asked for is taken to be new."""
    from checkpoints_conversion.plan import describe, plan_units

    target = Path(options.output_dir)
    units = plan_units(
        Path(options.input_dir), target, options.tensor_model_parallel_size, options.pipeline_model_parallel_size,
        options.ckpt_format, options.params_dtype, options.make_vocab_size_divisible_by, len(_tokens(options)),
    )  # fmt: skip
    return describe(units, target)


def convert(options: HfToMegatron) -> Report:
    """Convert; nothing appears under output_dir unless all of it was written. Raises UserError."""
    started, target = time.monotonic(), Path(options.output_dir)
    check_folders(options, options.overwrite, {TRACKER, "release"}, TRACKER)
    # Here and not above: neither --help nor such a mistake should wait for torch.
    from checkpoints_conversion.megatron_target import write_checkpoint
    from checkpoints_conversion.report import Report, count
    from checkpoints_conversion.stream import identity
    from checkpoints_conversion.tokenizer_copy import load_before_and_after
    from checkpoints_conversion.vocabulary import plan_growth
    from megatron_ft.models.architecture import check_layout
    from megatron_ft.models.dtypes import cast, torch_dtype
    from megatron_ft.models.hf_source import HfSource

    check_source(options.input_dir, options.verify_checkpoint)
    source = HfSource(options.input_dir)
    check_layout(source.arch, options.tensor_model_parallel_size, options.pipeline_model_parallel_size)
    path = Path(options.tokenizer) if options.tokenizer else None
    before, tokenizer = load_before_and_after(path, source.folder, _tokens(options))
    growth = plan_growth(source.arch, before, tokenizer, _noise(options, source))
    config = _checkpoint_config(options, source, growth.vocab_size, tokenizer)
    note_sizes(options, config.tensor_model_parallel_size, config.pipeline_model_parallel_size)
    dtype = torch_dtype(options.params_dtype) if options.params_dtype else None

    def full(placed: Placed) -> Tensor:
        tensor = cast(source.full(placed), options.params_dtype, placed.hf_keys[0])
        return growth.apply(tensor, placed.key) if placed.rule.cut == "vocab_parallel" else tensor

    files = write_checkpoint(
        target, config, source.rules, full, lambda one: dtype or source.dtype_of(one), tokenizer,
        {"options": asdict(options), "source": identity(source.files.values())}, options.overwrite,
    )  # fmt: skip
    parameters, tensors = count(config.architecture, source.rules)
    return Report(target, parameters, tensors, files, time.monotonic() - started)


def _tokens(options: HfToMegatron) -> tuple[str, ...]:
    """Every token asked for, once, in the order of their ids."""
    from checkpoints_conversion.vocabulary import parse_token_list, union
    from megatron_ft.data.chat_format import get_format
    from megatron_ft.data.tokenizer import extra_tokens

    of_format = get_format(options.chat_format).added_tokens if options.chat_format else ()
    return union(extra_tokens(options.tokenizer_type, parse_token_list(options.vocab_extra_ids_list)), of_format)


def _noise(options: HfToMegatron, source: HfSource) -> Noise | None:
    """The noise asked for, or None. Raises ConfigError for a deviation that is none."""
    from checkpoints_conversion.vocabulary import Noise
    from megatron_ft.log import logger

    std = options.new_rows_std
    if std is not None and not 0 < std < float("inf"):
        raise ConfigError(f"--new_rows_std {std}: must be above 0")
    if options.new_rows == "mean":
        if std is not None:
            logger("conversion").warning("--new_rows_std is ignored: it belongs to --new_rows noise")
        return None
    return Noise(float(std or source.arch.hf.get("initializer_range") or 0.02), options.new_rows_seed)


def _checkpoint_config(
    options: HfToMegatron, source: HfSource, vocab_size: int, tokenizer: Tokenizer | None
) -> CheckpointConfig:
    from importlib.metadata import version

    from megatron_ft.checkpoints.folder import CheckpointConfig
    from megatron_ft.models.architecture import padded_vocab_size
    from megatron_ft.models.rope import extend

    if options.make_vocab_size_divisible_by < 1:
        raise ConfigError(f"--make_vocab_size_divisible_by {options.make_vocab_size_divisible_by}: must be at least 1")
    tp_size = options.tensor_model_parallel_size
    arch = extend(source.arch, options.rope_scaling_type, options.rope_scaling_factor)
    return CheckpointConfig(
        architecture=replace(arch, vocab_size=vocab_size, hf=source.carried()),
        ckpt_format=options.ckpt_format,
        tensor_model_parallel_size=tp_size,
        pipeline_model_parallel_size=options.pipeline_model_parallel_size,
        padded_vocab_size=padded_vocab_size(vocab_size, tp_size, options.make_vocab_size_divisible_by),
        iteration="release",
        dtype=options.params_dtype or source.dtype,
        tokenizer=tokenizer.info() if tokenizer is not None else {},
        chat_format=options.chat_format,
        versions={name: version(name) for name in ("megatron_ft", "torch", "safetensors")},
    )


if __name__ == "__main__":
    sys.exit(run_script(COMMAND, run))
