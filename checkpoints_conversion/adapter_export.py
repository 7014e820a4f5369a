"""Writes the adapters of a checkpoint as a folder that PEFT loads, with the tokenizer of their run."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from pathlib import Path
from typing import NoReturn

from checkpoints_conversion.card_data import front_matter
from checkpoints_conversion.card_prompt import prompt_section
from checkpoints_conversion.card_training import settings_of
from checkpoints_conversion.exported_words import write_words
from checkpoints_conversion.megatron_source import Opened, parse_iteration
from checkpoints_conversion.model_card import MODEL_CARD, training_section
from checkpoints_conversion.options import Export, check_source
from checkpoints_conversion.serving import serving
from checkpoints_conversion.stream import identity, resumable_folder, seal
from checkpoints_conversion.tokenizer_copy import load_copy
from megatron_ft.adapters.peft_files import config_of, write_peft
from megatron_ft.adapters.stored import Stored, of_checkpoint
from megatron_ft.checkpoints.folder import find_checkpoint, read_config
from megatron_ft.errors import CheckpointError
from megatron_ft.log import logger
from megatron_ft.models.activation_swap import swap_of
from megatron_ft.models.dtypes import cast
from megatron_ft.models.families import family_of
from megatron_ft.models.weights import Placed

_EXAMPLE = """\
```python
from peft import AutoPeftModelForCausalLM

model = AutoPeftModelForCausalLM.from_pretrained("{name}")  # the folder of this file
```"""


@dataclass(frozen=True)
class AdapterReport:
    """What was written. base: as adapter_config.json names it."""

    folder: Path
    parameters: int
    base: str

    def __str__(self) -> str:
        return f"adapter of {self.parameters:,} parameters for {self.base} -> {self.folder}"


def export_adapter(options: Export, base_name: str | None) -> AdapterReport:
    """Write the adapters of a checkpoint as a PEFT folder. Raise CheckpointError if it holds a model."""
    folder = find_checkpoint(Path(options.input_dir), parse_iteration(options.iteration))
    check_source(folder, options.verify_checkpoint)
    config = read_config(folder)
    if config.adapter is None:
        raise CheckpointError(f"--adapter_only: {folder} holds a model, not adapters: drop --adapter_only")
    arch, stored = config.architecture, of_checkpoint(folder, config)
    carried = stored.carried if isinstance(stored.carried, dict) else None
    recorded_name = "" if carried else str(arch.hf.get("_name_or_path") or "")
    if recorded_name and not base_name and (swap := swap_of(arch)):
        logger("conversion").warning(
            f"the adapters belong to a model with activation {swap.after}, {recorded_name} has {swap.before}: the export names no model; "
            f"name one with --base_model_name"
        )
        recorded_name = ""
    peft = config_of(stored.lora, arch, base_name or recorded_name, carried)
    names = stored.lora.shapes(arch)
    rules = family_of(arch).rules(arch)
    source = Opened(folder, config, rules, _no_weights, _no_weights, load_copy(folder, config))
    target, base = Path(options.output_dir), str(peft.get("base_model_name_or_path") or "a model that is not recorded")
    with resumable_folder(
        target, {"options": asdict(options), "source": identity(source.files())}, options.overwrite
    ) as export:
        weights = {name: cast(stored.read(name), options.params_dtype, name) for name in names}
        write_peft(export, arch, stored.lora, weights, peft, stored.recorded)
        write_words(source, export, None)
        card = _card(target.name, source, export, stored, base, options.system)
        (export / MODEL_CARD).write_text(card, encoding="utf-8")
        seal(export, {}, but=[MODEL_CARD])
    return AdapterReport(target, stored.lora.parameters(arch), base)


def _card(name: str, source: Opened, export: Path, stored: Stored, base: str, system: str | None) -> str:
    config, folder, settings = source.config, source.folder, settings_of(source.folder)
    lora = stored.lora
    parts = [
        front_matter(config, folder, "peft", base, settings, None, lora=True) + f"\n# {name}",
        f"LoRA adapter of rank {lora.rank} for {base}, exported by megatron_ft. Iteration {config.iteration}, alpha {lora.alpha:g}, "
        f"modules {', '.join(lora.targets)}.",
        training_section(folder, settings),
        prompt_section(config, source.tokenizer, system),
        f"## Use\n\n{_EXAMPLE.format(name=name)}",
        f"## Serve\n\n{serving(export, name).markdown()}",
    ]
    return "\n\n".join(part for part in parts if part) + "\n"


def _no_weights(_: Placed) -> NoReturn:
    raise AssertionError("an adapter's export reads no weights of the model")
