"""megatron-ft megatron-to-hf: convert a checkpoint to a Hugging Face model with config, tokenizer, chat template and model card."""

from __future__ import annotations

import sys
import time
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

from checkpoints_conversion.options import QuantisedExport, check_folders
from megatron_ft.config.cli import Command, run_script
from megatron_ft.errors import ConfigError
from megatron_ft.log import logger

if TYPE_CHECKING:
    from checkpoints_conversion.adapter_export import AdapterReport
    from checkpoints_conversion.megatron_source import Opened
    from checkpoints_conversion.report import Report


@dataclass(frozen=True)
class MegatronToHf(QuantisedExport):
    """Source and result"""

    input_dir: str = field(metadata={"required": True})
    """Checkpoint to convert, of megatron-ft or Megatron-LLM: its root, or one release or iter_ folder."""
    output_dir: str = field(metadata={"required": True, "writes": "folder"})
    """Folder of the new Hugging Face model."""
    max_shard_size: str = "5GB"
    """Largest size of a file of weights, such as 5GB or 200MB."""
    require_certificate: bool = False
    """Stop if the checkpoint has no valid certificate.json (made by verify); default: only a warning."""
    adapter_only: bool = False
    """Write the adapters of a run with --lora_rank as a PEFT folder, without their model."""
    base_model_name: str | None = None
    """With --adapter_only: name or folder of the Hugging Face model for PEFT to load; default: as recorded at its conversion."""


COMMAND = Command(
    name="megatron-to-hf",
    summary="convert a checkpoint to a Hugging Face model with tokenizer and chat template",
    sections=(MegatronToHf,),
    examples=(
        "megatron-ft megatron-to-hf checkpoints/llama2-70b-oasst exports/llama2-70b-oasst --params_dtype bf16",
        "megatron-ft megatron-to-hf checkpoints/falcon-7b exports/falcon-7b --iteration 500 --require_certificate",
        "megatron-ft megatron-to-hf runs/adapters exports/adapter --adapter_only --base_model_name meta-llama/Llama-2-13b-hf",
        "megatron-ft megatron-to-hf runs/merged exports/merged-gptq --quantize gptq --desc_act --calibration shards/train",
        "megatron-ft megatron-to-hf runs/merged exports/merged-gguf --quantize gguf-q8_0 --max_shard_size 100GB",
    ),
    positional=("input_dir", "output_dir"),
    common=(
        "input_dir",
        "output_dir",
        "params_dtype",
        "overwrite",
        "iteration",
        "tokenizer",
        "quantize",
        "bits",
        "group_size",
        "calibration",
        "max_shard_size",
        "require_certificate",
        "adapter_only",
        "base_model_name",
    ),
)


def run(options: MegatronToHf) -> None:
    print(convert(options))


def convert(options: MegatronToHf) -> Report | AdapterReport:
    """Convert and return a report. output_dir appears only when everything is written. Raise UserError."""
    started = time.monotonic()
    check_folders(options, options.overwrite, set(), _marker(options))
    # Imported here, so that --help and the checks above do not wait for torch.
    from checkpoints_conversion.card_prompt import prompt_section
    from checkpoints_conversion.megatron_source import open_megatron
    from checkpoints_conversion.quantised_export import check_options, export_quantised

    if options.quantize and options.adapter_only:
        raise ConfigError("--quantize is for a model: drop it, or drop --adapter_only")
    check_options(options)
    if options.adapter_only:
        from checkpoints_conversion.adapter_export import export_adapter

        return export_adapter(options, options.base_model_name)
    if options.base_model_name:
        raise ConfigError("--base_model_name is for an exported adapter: add --adapter_only, or drop it")
    source = open_megatron(Path(options.input_dir), options)
    prompt_section(
        source.config, source.tokenizer, options.system
    )  # a mistake in it is found before weights are written
    trained = source.config.iteration != "release"
    problem = _certificate_problem(source.folder, trained, options.require_certificate)
    if options.quantize:
        return export_quantised(source, options, options.max_shard_size, started, certified=problem is None)
    report = write_model(source, options, options.max_shard_size, started, certified=problem is None)
    if problem and not trained:  # a trained checkpoint can only be compared with this export, after it is written
        logger("conversion").warning("not certified: %s", problem)
    return report


def _marker(options: MegatronToHf) -> str:
    """Return a file that an earlier export of this kind has."""
    if options.adapter_only:
        return "adapter_config.json"
    files = sorted(path.name for path in Path(options.output_dir).glob("model-*.gguf"))
    return files[0] if files else "config.json"


class _Target(Protocol):
    """Options of a command that writes a model."""

    @property
    def output_dir(self) -> str: ...
    @property
    def params_dtype(self) -> Any: ...
    @property
    def overwrite(self) -> bool: ...
    @property
    def system(self) -> str | None: ...


def write_model(source: Opened, options: _Target, max_shard_size: str, started: float, certified: bool) -> Report:
    """Write a Hugging Face model and return a report. options: a dataclass, also what tells interrupted conversions apart."""
    from checkpoints_conversion.exported_words import write_words
    from checkpoints_conversion.hf_target import parse_size, plan_safetensors, write_index
    from checkpoints_conversion.model_card import MODEL_CARD, model_card
    from checkpoints_conversion.report import Report, count
    from checkpoints_conversion.stream import identity, resumable_folder, seal, write_units
    from megatron_ft.models.dtypes import HF_NAMES, cast, torch_dtype
    from megatron_ft.models.families import family_of
    from megatron_ft.models.weights import placed_rules

    target, max_bytes = Path(options.output_dir), parse_size(max_shard_size)
    config, rules = source.config, source.rules
    arch, dtype = config.architecture, options.params_dtype or config.dtype
    kind = torch_dtype(options.params_dtype) if options.params_dtype else None
    values: Any = options
    key = {"options": asdict(values), "source": identity(source.files())}
    with resumable_folder(target, key, options.overwrite) as export:
        units = plan_safetensors(
            export, placed_rules(arch, rules), arch, lambda one: kind or source.dtype(one), max_bytes
        )
        weights = write_units(
            units, lambda one: cast(source.full(one), options.params_dtype, one.key), f"writing {target.name}:"
        )
        write_index(export, units)
        write_words(source, export, family_of(arch).to_hf(arch, HF_NAMES[dtype]))
        card = model_card(target.name, source, dtype, export, certified, options.system)
        (export / MODEL_CARD).write_text(card, encoding="utf-8")
        seal(export, weights, but=[MODEL_CARD])
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


if __name__ == "__main__":
    sys.exit(run_script(COMMAND, run))
