"""A Megatron checkpoint to a Hugging Face model: weights, config, tokenizer, chat template, stop token, model card."""

from __future__ import annotations

import sys
import time
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from megatron_ft.config.cli import Command, run_script
from megatron_ft.files import atomic_folder, write_json

if TYPE_CHECKING:
    from checkpoints_conversion.report import Report
    from megatron_ft.data.tokenizer import Tokenizer
    from megatron_ft.models.checkpoint_layout import CheckpointConfig


@dataclass(frozen=True)
class MegatronToHf:
    """What to convert, and into what"""

    input_dir: str = field(metadata={"required": True})
    """Checkpoint: its root, or one release or iter_ folder."""
    output_dir: str = field(metadata={"required": True})
    """Hugging Face model folder to make."""
    iteration: str | None = None
    """Iteration to take, or release; default: the one latest_checkpointed_iteration.txt names."""
    max_shard_size: str = "5GB"
    """Most a safetensors file may hold."""
    params_dtype: Literal["fp32", "bf16", "fp16"] | None = None
    """Type of the weights; default: as in the checkpoint."""
    overwrite: bool = False
    """Replace an earlier export in output_dir."""


COMMAND = Command(
    name="megatron-to-hf",
    summary="a checkpoint to a Hugging Face model with tokenizer and chat template",
    sections=(MegatronToHf,),
    examples=("megatron-ft megatron-to-hf checkpoints/llama2-70b-oasst exports/llama2-70b-oasst --params_dtype bf16",),
    positional=("input_dir", "output_dir"),
)


def run(options: MegatronToHf) -> None:
    print(convert(options))


def convert(options: MegatronToHf) -> Report:
    """Convert; nothing appears under output_dir unless all of it was written. Raises UserError."""
    # Here and not above: --help should not wait for torch.
    from checkpoints_conversion.dtypes import HF_NAMES, cast
    from checkpoints_conversion.hf_target import parse_size, plan_files, write_safetensors
    from checkpoints_conversion.model_card import model_card
    from checkpoints_conversion.report import Report, check_target, count
    from checkpoints_conversion.tokenizer_copy import load_copy
    from megatron_ft.models.checkpoint_layout import find_checkpoint, read_config
    from megatron_ft.models.families import family_of
    from megatron_ft.models.weights import placed_rules

    started = time.monotonic()
    target, max_bytes = Path(options.output_dir), parse_size(options.max_shard_size)
    check_target(Path(options.input_dir), target, options.overwrite, set(), "config.json")
    folder = find_checkpoint(Path(options.input_dir), _iteration(options.iteration))
    config = read_config(folder)
    arch, family = config.architecture, family_of(config.architecture)
    rules, dtype = family.rules(arch), options.params_dtype or config.dtype
    source = open_checkpoint(folder, config)
    tokenizer = load_copy(folder, config)
    files = plan_files(placed_rules(arch, rules), arch, dtype, max_bytes)

    with atomic_folder(target, overwrite=options.overwrite) as export:
        write_safetensors(export, files, arch, lambda one: cast(source.full(one), options.params_dtype, one.key))
        hf_config, generation = _configs(family.to_hf(arch, HF_NAMES[dtype]), config, tokenizer)
        write_json(export / "config.json", hf_config)
        write_json(export / "generation_config.json", generation)
        if tokenizer is not None:
            _export_tokenizer(export, folder, config, tokenizer)
        (export / "README.md").write_text(model_card(target.name, config, dtype), encoding="utf-8")
    parameters, tensors = count(arch, rules)
    return Report(target, parameters, tensors, len(files), time.monotonic() - started)


def open_checkpoint(folder: Path, config: CheckpointConfig) -> Any:
    """The reader for the checkpoint's format: an object whose full(placed) gives whole tensors."""
    from checkpoints_conversion.classic import ClassicSource
    from checkpoints_conversion.torch_dist import TorchDistSource
    from megatron_ft.models.families import family_of

    source = TorchDistSource if config.ckpt_format == "torch_dist" else ClassicSource
    return source(folder, config, family_of(config.architecture).rules(config.architecture))


def _iteration(text: str | None) -> int | str | None:
    from megatron_ft.errors import ConfigError

    if text is None or text == "release":
        return text
    if not text.isdigit():
        raise ConfigError(f"--iteration {text}: give a number, or release")
    return int(text)


def _configs(hf_config: dict, config: CheckpointConfig, tokenizer: Tokenizer | None) -> tuple[dict, dict]:
    """config.json and generation_config.json. Generation ends at the format's stop token, and still at the old ends."""
    from megatron_ft.data.chat_format import get_format

    generation = dict(hf_config.pop("generation_config", {}))
    for key in ("bos_token_id", "eos_token_id", "pad_token_id"):
        if hf_config.get(key) is not None:
            generation.setdefault(key, hf_config[key])
    if config.chat_format and tokenizer is not None:
        stop = tokenizer.token_id(get_format(config.chat_format).stop_token)
        old = generation.get("eos_token_id")
        old = old if isinstance(old, list) else [] if old is None else [old]
        generation["eos_token_id"] = [stop, *(token for token in old if token != stop)]
    return hf_config, generation


def _export_tokenizer(export: Path, folder: Path, config: CheckpointConfig, tokenizer: Tokenizer) -> None:
    from checkpoints_conversion.tokenizer_copy import original_template
    from megatron_ft.data.chat_format import get_format
    from megatron_ft.data.tokenizer_export import export_tokenizer

    chat_format = get_format(config.chat_format) if config.chat_format else None
    export_tokenizer(
        tokenizer,
        export,
        chat_template=chat_format.jinja if chat_format else original_template(folder),
        stop_token=chat_format.stop_token if chat_format else None,
        model_max_length=config.architecture.max_position_embeddings,
    )


if __name__ == "__main__":
    sys.exit(run_script(COMMAND, run))
