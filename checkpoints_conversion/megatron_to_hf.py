"""megatron-ft megatron-to-hf: convert a checkpoint to a Hugging Face model with config, tokenizer, chat template and model card."""

from __future__ import annotations

import sys
import time
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

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
    from megatron_ft.data.tokenizer_export import special_names
    from megatron_ft.log import logger
    from megatron_ft.models.dtypes import HF_NAMES, cast, torch_dtype
    from megatron_ft.models.families import family_of
    from megatron_ft.models.weights import placed_rules

    max_bytes = parse_size(options.max_shard_size)
    source = open_megatron(Path(options.input_dir), options)
    folder, config, tokenizer, rules = source.folder, source.config, source.tokenizer, source.rules
    arch, family, dtype = config.architecture, family_of(config.architecture), options.params_dtype or config.dtype
    chat_format = _spoken(config, tokenizer)
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
        names = special_names(tokenizer, chat_format.stop_token if chat_format else None) if tokenizer else {}
        ids = {key: tokenizer.token_id(name) for key, name in names.items()} if tokenizer else {}
        stop_id = ids.get("eos_token") if chat_format else None
        hf_config, generation = _configs(family.to_hf(arch, HF_NAMES[dtype]), stop_id, ids.get("pad_token"))
        write_json(export / "config.json", hf_config)
        write_json(export / "generation_config.json", generation)
        if tokenizer is not None:
            _export_tokenizer(export, folder, config, tokenizer, chat_format, names)
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


def _configs(hf_config: dict, stop_id: int | None, pad_id: int | None) -> tuple[dict, dict]:
    """Return config.json and generation_config.json. Generation ends at the format's stop token and at the model's own."""
    generation = dict(hf_config.pop("generation_config", {}))
    for key in ("bos_token_id", "eos_token_id", "pad_token_id"):
        if hf_config.get(key) is not None:
            generation.setdefault(key, hf_config[key])
    if stop_id is not None:
        generation["eos_token_id"] = _first(stop_id, generation.get("eos_token_id"))
        ends = hf_config.get("eos_token_id")
        hf_config["eos_token_id"] = _first(stop_id, ends) if isinstance(ends, list) else stop_id
    if pad_id is not None:
        generation["pad_token_id"] = hf_config["pad_token_id"] = pad_id
    return hf_config, generation


def _first(stop_id: int, others: int | list[int] | None) -> list[int]:
    others = others if isinstance(others, list) else [] if others is None else [others]
    return [stop_id, *(index for index in others if index != stop_id)]


def _spoken(config: CheckpointConfig, tokenizer: Tokenizer | None) -> Any:
    """Return the recorded chat format, else the template of the tokenizer, None without one that says where answers end."""
    from megatron_ft.data.chat_format import get_format
    from megatron_ft.data.chat_template import NoTemplate, own_template, today
    from megatron_ft.errors import DataError, TokenizerError
    from megatron_ft.log import logger

    if tokenizer is None or config.chat_format:
        return get_format(config.chat_format) if config.chat_format else None
    try:
        return own_template(tokenizer, today())
    except NoTemplate:
        return None
    except (TokenizerError, DataError) as error:
        logger("conversion").warning(
            "the stop token of the chat template is unknown, the model's own is kept: %s", error
        )
        return None


def _export_tokenizer(
    export: Path, folder: Path, config: CheckpointConfig, tokenizer: Tokenizer, chat_format: Any, names: dict[str, str]
) -> None:
    from checkpoints_conversion.tokenizer_copy import original_templates
    from megatron_ft.data.tokenizer_export import export_tokenizer

    export_tokenizer(
        tokenizer,
        export,
        chat_template=chat_format.exported if chat_format else original_templates(folder),
        stop_token=names.get("eos_token"),
        model_max_length=config.architecture.max_position_embeddings,
    )


if __name__ == "__main__":
    sys.exit(run_script(COMMAND, run))
