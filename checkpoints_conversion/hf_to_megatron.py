"""A Hugging Face model to a Megatron checkpoint, cut for tensor and pipeline parallelism."""

from __future__ import annotations

import sys
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Literal

from megatron_ft.config.cli import Command, run_script
from megatron_ft.errors import ConfigError

if TYPE_CHECKING:
    from checkpoints_conversion.hf_source import HfSource
    from checkpoints_conversion.report import Report
    from megatron_ft.data.tokenizer import Tokenizer


@dataclass(frozen=True)
class HfToMegatron:
    """What to convert, and into what"""

    input_dir: str = field(metadata={"required": True})
    """Hugging Face model folder: config.json, safetensors, tokenizer files."""
    output_dir: str = field(metadata={"required": True})
    """Checkpoint to make; finetune takes it as --load."""
    tensor_model_parallel_size: int = 1
    """Parts each matrix is cut into."""
    pipeline_model_parallel_size: int = 1
    """Groups of layers."""
    ckpt_format: Literal["torch", "torch_dist"] = "torch"
    """torch: one file a rank, for this layout. torch_dist: megatron-core's own, read by any layout."""
    tokenizer_type: str | None = None
    """As in pretokenize: SentencePieceTokenizer puts Megatron's own five tokens before the extra ones, so that ids equal
    those of shards made with it."""
    vocab_extra_ids_list: str | None = None
    """Tokens to add, comma-separated, such as "<|im_start|>,<|im_end|>". New rows are the mean of the old ones."""
    make_vocab_size_divisible_by: int = 128
    """The embedding gets rows of zeros up to a multiple of this times the tensor parallel size."""
    chat_format: str | None = None
    """Chat format to record (chatml), for generate, chat and the exported template; its tokens are added."""
    rope_scaling_type: Literal["linear", "ntk", "ntk-margin", "ntk-yarn", "ntk-by-parts", "yarn", "dynamic"] = "linear"
    """How --rope_scaling_factor stretches the context."""
    rope_scaling_factor: float = 1.0
    """Stretch the context this many times: recorded in the checkpoint, for training, generation and export. 1: not."""
    params_dtype: Literal["fp32", "bf16", "fp16"] | None = None
    """Type of the weights; default: as in the source."""
    tokenizer: str | None = None
    """tokenizer.model, tokenizer.json or a folder; default: the model folder's."""
    plan: bool = False
    """Only list the files and tensors that would be written, exact to the byte; needs config.json, no weights."""
    overwrite: bool = False
    """Replace an earlier conversion in output_dir."""


COMMAND = Command(
    name="hf-to-megatron",
    summary="a Hugging Face model to a checkpoint split for tensor and pipeline parallelism",
    sections=(HfToMegatron,),
    examples=(
        "megatron-ft hf-to-megatron llama2-70b checkpoints/llama2-70b-tp8-pp4 "
        "--tensor_model_parallel_size 8 --pipeline_model_parallel_size 4 --chat_format chatml",
        "megatron-ft hf-to-megatron mistral-7b checkpoints/mistral-7b-32k --ckpt_format torch_dist "
        "--rope_scaling_type yarn --rope_scaling_factor 4",
    ),
    positional=("input_dir", "output_dir"),
)


def run(options: HfToMegatron) -> None:
    print(planned(options) if options.plan else convert(options))


def planned(options: HfToMegatron) -> str:
    """What convert would write; every token asked for is taken to be new."""
    from checkpoints_conversion.plan import describe, plan_units
    from checkpoints_conversion.vocabulary import parse_token_list, union

    tokens = union(parse_token_list(options.vocab_extra_ids_list), _format_tokens(options.chat_format))
    target = Path(options.output_dir)
    units = plan_units(
        Path(options.input_dir), target, options.tensor_model_parallel_size, options.pipeline_model_parallel_size,
        options.ckpt_format, options.params_dtype, options.make_vocab_size_divisible_by, len(tokens),
    )  # fmt: skip
    return describe(units, target)


def convert(options: HfToMegatron) -> Report:
    """Convert; nothing appears under output_dir unless all of it was written. Raises UserError."""
    # Here and not above: --help should not wait for torch.
    from checkpoints_conversion.dtypes import cast, torch_dtype
    from checkpoints_conversion.hf_source import HfSource
    from checkpoints_conversion.megatron_target import write_checkpoint
    from checkpoints_conversion.report import Report, check_target, count
    from checkpoints_conversion.stream import identity
    from checkpoints_conversion.tokenizer_copy import load_before_and_after
    from checkpoints_conversion.vocabulary import parse_token_list, plan_growth, union
    from megatron_ft.data.tokenizer import extra_tokens
    from megatron_ft.models.architecture import check_layout
    from megatron_ft.models.checkpoint_layout import TRACKER

    started = time.monotonic()
    target = Path(options.output_dir)
    check_target(Path(options.input_dir), target, options.overwrite, {TRACKER, "release"}, TRACKER)
    source = HfSource(options.input_dir)
    check_layout(source.arch, options.tensor_model_parallel_size, options.pipeline_model_parallel_size)
    listed = extra_tokens(options.tokenizer_type, parse_token_list(options.vocab_extra_ids_list))
    tokens = union(listed, _format_tokens(options.chat_format))
    path = Path(options.tokenizer) if options.tokenizer else None
    before, tokenizer = load_before_and_after(path, source.folder, tokens)
    growth = plan_growth(source.arch, before, tokenizer)
    config = _checkpoint_config(options, source, growth.vocab_size, tokenizer)
    dtype = torch_dtype(options.params_dtype) if options.params_dtype else None

    def full(placed):
        tensor = cast(source.full(placed), options.params_dtype, placed.hf_keys[0])
        return growth.apply(tensor) if placed.rule.cut == "vocab_rows" else tensor

    files = write_checkpoint(
        target, config, source.rules, full, lambda one: dtype or source.dtype_of(one), tokenizer,
        {"options": asdict(options), "source": identity([*set(source.files.values())])}, options.overwrite,
    )  # fmt: skip
    parameters, tensors = count(config.architecture, source.rules)
    return Report(target, parameters, tensors, files, time.monotonic() - started)


def _format_tokens(chat_format: str | None) -> Sequence[str]:
    from megatron_ft.data.chat_format import get_format

    return get_format(chat_format).added_tokens if chat_format else ()


def _checkpoint_config(options: HfToMegatron, source: HfSource, vocab_size: int, tokenizer: Tokenizer | None):
    from importlib.metadata import version

    from megatron_ft.models.architecture import padded_vocab_size
    from megatron_ft.models.checkpoint_layout import CheckpointConfig
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
