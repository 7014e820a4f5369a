"""megatron-ft megatron-to-hf: convert a checkpoint to a Hugging Face model with config, tokenizer, chat template and model card."""

from __future__ import annotations

import sys
import time
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING

from checkpoints_conversion.options import CheckpointSource, Folders, Written, check_folders
from megatron_ft.config.cli import Command, run_script
from megatron_ft.files import write_json

if TYPE_CHECKING:
    from checkpoints_conversion.report import Report
    from megatron_ft.checkpoints.folder import CheckpointConfig
    from megatron_ft.data.tokenizer import Tokenizer


@dataclass(frozen=True)
class MegatronToHf(CheckpointSource, Written, Folders):
    """Source and result"""

    input_dir: str = field(metadata={"required": True})
    """Checkpoint to convert, of megatron-ft or Megatron-LLM: its root, or one release or iter_ folder."""
    output_dir: str = field(metadata={"required": True})
    """Folder of the new Hugging Face model."""
    max_shard_size: str = "5GB"
    """Largest size of a safetensors file, such as 5GB or 200MB."""
    require_certificate: bool = False
    """Stop if the checkpoint has no valid certificate.json (made by verify); default: only a warning."""


COMMAND = Command(
    name="megatron-to-hf",
    summary="convert a checkpoint to a Hugging Face model with tokenizer and chat template",
    sections=(MegatronToHf,),
    examples=(
        "megatron-ft megatron-to-hf checkpoints/llama2-70b-oasst exports/llama2-70b-oasst --params_dtype bf16",
        "megatron-ft megatron-to-hf checkpoints/falcon-7b exports/falcon-7b --iteration 500 --require_certificate",
    ),
    positional=("input_dir", "output_dir"),
)


def run(options: MegatronToHf) -> None:
    print(convert(options))


def convert(options: MegatronToHf) -> Report:
    """Convert and return a report. output_dir appears only when everything is written. Raise UserError."""
    started, target = time.monotonic(), Path(options.output_dir)
    check_folders(options, options.overwrite, set(), "config.json")
    # Imported here, so that --help and the checks above do not wait for torch.
    from checkpoints_conversion.hf_target import parse_size, plan_safetensors, write_index
    from checkpoints_conversion.megatron_source import open_megatron
    from checkpoints_conversion.model_card import MODEL_CARD, model_card
    from checkpoints_conversion.report import Report, count
    from checkpoints_conversion.stream import identity, resumable_folder, seal, write_units
    from megatron_ft.log import logger
    from megatron_ft.models.dtypes import HF_NAMES, cast, torch_dtype
    from megatron_ft.models.families import family_of
    from megatron_ft.models.weights import placed_rules

    max_bytes = parse_size(options.max_shard_size)
    source = open_megatron(Path(options.input_dir), options)
    folder, config, tokenizer, rules = source.folder, source.config, source.tokenizer, source.rules
    arch, family, dtype = config.architecture, family_of(config.architecture), options.params_dtype or config.dtype
    trained = config.iteration != "release"
    problem = _certificate_problem(folder, trained, options.require_certificate)
    kind = torch_dtype(options.params_dtype) if options.params_dtype else None
    key = {"options": asdict(options), "source": identity(source.files())}
    with resumable_folder(target, key, options.overwrite) as export:
        units = plan_safetensors(
            export, placed_rules(arch, rules), arch, lambda one: kind or source.dtype(one), max_bytes
        )
        weights = write_units(
            units, lambda one: cast(source.full(one), options.params_dtype, one.key), f"writing {target.name}:"
        )
        write_index(export, units)
        hf_config, generation = _configs(family.to_hf(arch, HF_NAMES[dtype]), config, tokenizer)
        write_json(export / "config.json", hf_config)
        write_json(export / "generation_config.json", generation)
        if tokenizer is not None:
            _export_tokenizer(export, folder, config, tokenizer)
        card = model_card(target.name, config, dtype, folder, certified=problem is None)
        (export / MODEL_CARD).write_text(card, encoding="utf-8")
        seal(export, weights, but=[MODEL_CARD])
    if problem and not trained:  # a trained checkpoint can only be compared with this export, after it is written
        logger("conversion").warning("not certified: %s", problem)
    parameters, tensors = count(arch, rules)
    return Report(target, parameters, tensors, len(units), time.monotonic() - started)


def _certificate_problem(folder: Path, trained: bool, required: bool) -> str | None:
    """Return why the weights are not certified, or None. Raise CheckpointError with the reason if a certificate is required."""
    from checkpoints_conversion.certificate import problem_with
    from megatron_ft.errors import CheckpointError

    problem = problem_with(folder, trained)
    if problem and required:
        raise CheckpointError(f"--require_certificate: {problem}")
    return problem


def _configs(hf_config: dict, config: CheckpointConfig, tokenizer: Tokenizer | None) -> tuple[dict, dict]:
    """Return config.json and generation_config.json. Generation ends at the format's stop token and at the model's own."""
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
