"""megatron-ft hf-to-megatron: convert a Hugging Face model to a Megatron checkpoint, split for tensor and pipeline parallelism."""

from __future__ import annotations

import sys
import time
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Literal

from checkpoints_conversion.options import CheckpointFormat, Folders, Written, check_folders, check_source, note_sizes
from megatron_ft.checkpoints.folder import TRACKER
from megatron_ft.config.cli import Command, run_script
from megatron_ft.config.expected import RopeScaling
from megatron_ft.config.model_parallel import ModelParallel
from megatron_ft.errors import ConfigError
from megatron_ft.models.activation_swap import Activation

if TYPE_CHECKING:
    from torch import Tensor

    from checkpoints_conversion.report import Report
    from checkpoints_conversion.vocabulary import Noise
    from megatron_ft.checkpoints.folder import CheckpointConfig
    from megatron_ft.data.tokenizer import Tokenizer
    from megatron_ft.models.hf_source import HfSource
    from megatron_ft.models.quantised import Quantization
    from megatron_ft.models.weights import Placed


@dataclass(frozen=True)
class HfToMegatron(Written, CheckpointFormat, ModelParallel, Folders):
    """Source, result and vocabulary"""

    input_dir: str = field(metadata={"required": True})
    """Hugging Face model folder to convert, with config.json, safetensors and tokenizer files."""
    output_dir: str = field(metadata={"required": True, "writes": "folder"})
    """Folder of the new checkpoint, for finetune's --load."""
    tokenizer_type: str | None = None
    """Tokenizer type, which must be the same as for pretokenize; SentencePieceTokenizer adds Megatron's own five tokens before the extra
    ones. Default: none are added."""
    vocab_extra_ids_list: str | None = None
    """Tokens to add to the vocabulary, separated by commas, such as "<|im_start|>,<|im_end|>"."""
    new_rows: Literal["mean", "noise"] = "mean"
    """Initial embeddings of added tokens: the mean of the existing rows (mean), or the mean plus seeded noise (noise)."""
    new_rows_std: float | None = None
    """With --new_rows noise: its standard deviation; default: initializer_range of the model's config.json, else 0.02."""
    new_rows_seed: int = 1234
    """With --new_rows noise: its seed, which gives the same rows in every layout and format."""
    chat_format: str | None = None
    """Chat format, such as chatml, to record for generate, chat and the exported template; its tokens are added. Default: none."""
    rope_scaling_type: RopeScaling = "linear"
    """RoPE scaling method with which --rope_scaling_factor extends the context."""
    rope_scaling_factor: float = 1.0
    """Extend the model's context by this factor, recorded in the checkpoint for training, generation and export; 1: no extension."""
    activation: Activation | None = None
    """Swap the activation of the MLP for this one, which training then has to make up for; a gated MLP stays gated (relu: ReGLU).
    Recorded in the checkpoint, its certificate and its exports. Default: the source's."""
    tokenizer: str | None = None
    """Tokenizer: a tokenizer.model, a tokenizer.json or a folder; default: that of the model folder."""
    quantize: Literal["nf4", "none"] | None = None
    """Store the linears of the layers in 4 bits (nf4), as the frozen base of adapters; none: dequantise a source that transformers saved
    with bitsandbytes. Default: as the source."""
    double_quant: bool = False
    """With --quantize nf4: also store the scales in 8 bits (double quantisation), 4.127 instead of 4.5 bits per weight on disk."""
    verify_checkpoint: bool = True
    """Compare the source's files with their recorded digests, which exports of megatron-ft have; --no_verify_checkpoint skips this."""
    plan: bool = False
    """Only list the files and tensors that would be written, with exact sizes; needs only config.json, not the weights."""


COMMAND = Command(
    name="hf-to-megatron",
    summary="convert a Hugging Face model to a checkpoint split for tensor and pipeline parallelism",
    sections=(HfToMegatron,),
    examples=(
        "megatron-ft hf-to-megatron llama2-70b checkpoints/llama2-70b-tp8-pp4 "
        "--tensor_model_parallel_size 8 --pipeline_model_parallel_size 4 --ckpt_format torch --chat_format chatml",
        "megatron-ft hf-to-megatron mistral-7b checkpoints/mistral-7b-32k "
        "--rope_scaling_type yarn --rope_scaling_factor 4",
        "megatron-ft hf-to-megatron falcon-40b checkpoints/relu-falcon-40b --activation relu --tensor_model_parallel_size 8",
    ),
    positional=("input_dir", "output_dir"),
    common=(
        "input_dir",
        "output_dir",
        "tensor_model_parallel_size",
        "pipeline_model_parallel_size",
        "params_dtype",
        "overwrite",
        "vocab_extra_ids_list",
        "chat_format",
        "rope_scaling_type",
        "rope_scaling_factor",
        "activation",
        "tokenizer",
        "quantize",
        "plan",
    ),
)


def run(options: HfToMegatron) -> None:
    print(planned(options) if options.plan else convert(options))


def planned(options: HfToMegatron) -> str:
    """Return what convert would write, as if every requested token were new."""
    from checkpoints_conversion.plan import describe, plan_units

    target = Path(options.output_dir)
    units = plan_units(
        Path(options.input_dir), target, options.tensor_model_parallel_size, options.pipeline_model_parallel_size,
        options.ckpt_format, options.params_dtype, options.make_vocab_size_divisible_by, len(_tokens(options)),
        _quantization(options, None), options.activation,
    )  # fmt: skip
    return describe(units, target)


def convert(options: HfToMegatron) -> Report:
    """Convert and return a report. output_dir appears only when everything is written. Raise UserError."""
    started, target = time.monotonic(), Path(options.output_dir)
    check_folders(options, options.overwrite, {TRACKER, "release"}, TRACKER)
    # Imported here, so that --help and the checks above do not wait for torch.
    from checkpoints_conversion.megatron_target import write_checkpoint
    from checkpoints_conversion.quantise import Quantiser, matrix_of, stored_dtype
    from checkpoints_conversion.report import Report, count
    from checkpoints_conversion.stream import identity
    from checkpoints_conversion.tokenizer_copy import load_before_and_after
    from checkpoints_conversion.vocabulary import plan_growth
    from megatron_ft.data.tokenizer_check import check_vocabulary
    from megatron_ft.models.activation_swap import in_words as swap_in_words
    from megatron_ft.models.architecture import check_layout
    from megatron_ft.models.dtypes import cast, torch_dtype
    from megatron_ft.models.hf_source import HfSource
    from megatron_ft.models.quantised import check_blocks, stored_rules

    check_source(options.input_dir, options.verify_checkpoint)
    source = HfSource(options.input_dir)
    check_layout(source.arch, options.tensor_model_parallel_size, options.pipeline_model_parallel_size)
    quantization = _quantization(options, source)
    if quantization:
        check_blocks(source.arch, source.rules, options.tensor_model_parallel_size)
    path = Path(options.tokenizer) if options.tokenizer else None
    before, tokenizer = load_before_and_after(path, source.folder, _tokens(options))
    if before is not None:
        check_vocabulary(before, source.arch.vocab_size, source.folder)
    growth = plan_growth(source.arch, before, tokenizer, _noise(options, source))
    config = replace(_checkpoint_config(options, source, growth.vocab_size, tokenizer), quantization=quantization)
    note_sizes(options, config.tensor_model_parallel_size, config.pipeline_model_parallel_size)
    dtype = torch_dtype(options.params_dtype) if options.params_dtype else None

    def full(placed: Placed) -> Tensor:
        tensor = cast(source.full(placed), options.params_dtype, placed.hf_keys[0])
        return growth.apply(tensor, placed.key) if placed.rule.cut == "vocab_parallel" else tensor

    if quantization:
        matrix = matrix_of(source, quantization, options.params_dtype)
        full = Quantiser(config.architecture, quantization, matrix, full).full
    kind = stored_dtype(lambda one: dtype or source.dtype_of(one))
    files = write_checkpoint(
        target, config, stored_rules(source.rules, quantization), full, kind, tokenizer,
        {"options": asdict(options), "source": identity(source.files.values())}, options.overwrite,
    )  # fmt: skip
    parameters, tensors = count(config.architecture, source.rules)
    return Report(target, parameters, tensors, files, time.monotonic() - started, swap_in_words(config.architecture))


def _quantization(options: HfToMegatron, source: HfSource | None) -> Quantization | None:
    """Return how the checkpoint is quantised, by the flags, else as the source. Raise ConfigError where flags contradict each other."""
    from megatron_ft.models.quantised import Quantization

    stored = source.quantization if source else None
    wanted = options.quantize or ("nf4" if stored else "none")
    if options.double_quant and wanted != "nf4":
        raise ConfigError("--double_quant is about --quantize nf4: add it, or drop --double_quant")
    if wanted == "none":
        return None
    return Quantization(options.double_quant or bool(stored and stored.double_quant))


def _format_name(given: str | None) -> str | None:
    """Return the whole name of a chat format."""
    from megatron_ft.data.chat_format import get_format

    return get_format(given).name if given else None


def _tokens(options: HfToMegatron) -> tuple[str, ...]:
    """Return every requested token once, in the order of ids."""
    from checkpoints_conversion.vocabulary import parse_token_list, union
    from megatron_ft.data.chat_format import get_format
    from megatron_ft.data.tokenizer import extra_tokens

    of_format = get_format(options.chat_format).added_tokens if options.chat_format else ()
    return union(extra_tokens(options.tokenizer_type, parse_token_list(options.vocab_extra_ids_list)), of_format)


def _noise(options: HfToMegatron, source: HfSource) -> Noise | None:
    """Return the requested noise, or None. Raise ConfigError for an invalid deviation."""
    from checkpoints_conversion.vocabulary import Noise
    from megatron_ft.log import logger

    std = options.new_rows_std
    if std is not None and not 0 < std < float("inf"):
        raise ConfigError(f"--new_rows_std {std}: must be above 0")
    if options.new_rows == "mean":
        if std is not None:
            logger("conversion").warning("--new_rows_std has no effect without --new_rows noise")
        return None
    return Noise(float(std or source.arch.hf.get("initializer_range") or 0.02), options.new_rows_seed)


def _checkpoint_config(
    options: HfToMegatron, source: HfSource, vocab_size: int, tokenizer: Tokenizer | None
) -> CheckpointConfig:
    from importlib.metadata import version

    from checkpoints_conversion.base_card import carried_entries
    from megatron_ft.checkpoints.folder import CheckpointConfig
    from megatron_ft.models.activation_swap import swap_activation
    from megatron_ft.models.architecture import padded_vocab_size
    from megatron_ft.models.rope import extend

    if options.make_vocab_size_divisible_by < 1:
        raise ConfigError(f"--make_vocab_size_divisible_by {options.make_vocab_size_divisible_by}: must be at least 1")
    tp_size = options.tensor_model_parallel_size
    arch = extend(source.arch, options.rope_scaling_type, options.rope_scaling_factor)
    arch = replace(arch, vocab_size=vocab_size, hf=source.carried())
    arch = swap_activation(arch, options.activation) if options.activation else arch
    return CheckpointConfig(
        architecture=arch,
        ckpt_format=options.ckpt_format,
        tensor_model_parallel_size=tp_size,
        pipeline_model_parallel_size=options.pipeline_model_parallel_size,
        padded_vocab_size=padded_vocab_size(vocab_size, tp_size, options.make_vocab_size_divisible_by),
        iteration="release",
        dtype=options.params_dtype or source.dtype,
        tokenizer=tokenizer.info() if tokenizer is not None else {},
        chat_format=_format_name(options.chat_format),
        versions={name: version(name) for name in ("megatron_ft", "torch", "safetensors")},
        card=carried_entries(Path(options.input_dir)),
    )


if __name__ == "__main__":
    sys.exit(run_script(COMMAND, run))
