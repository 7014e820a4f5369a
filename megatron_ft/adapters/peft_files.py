"""A folder of PEFT: adapter_config.json and adapter_model.safetensors, read and written; adapter_model.bin is read.

Compared with PEFT 0.21. Only what this project can train is read: plain LoRA of one rank on the linears of all layers. The rest of a
file's config is carried and written again.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch import Tensor

from megatron_ft.adapters.spec import Lora, Projection, check, check_tokens, projections, rows_key, tables
from megatron_ft.errors import CheckpointError, ConfigError
from megatron_ft.files import read_json, write_json
from megatron_ft.models.architecture import Architecture
from megatron_ft.models.hf_source import PickledFile
from megatron_ft.models.safetensors_file import SafetensorsFile
from megatron_ft.wording import counted

CONFIG, WEIGHTS, PICKLED = "adapter_config.json", "adapter_model.safetensors", "adapter_model.bin"
BASE = "adapter_base.json"
"""Ours, beside them: the hashes of the model's weights."""
_PREFIX = "base_model.model."
_REMEDY = "save the adapter again with PEFT"
_MUST_BE: dict[str, tuple[Any, ...]] = {
    "peft_type": ("LORA",),
    "bias": (None, "none"),
    **dict.fromkeys(("use_dora", "fan_in_fan_out", "lora_bias", "use_qalora", "use_bdlora"), (None, False)),
    **dict.fromkeys(("modules_to_save", "target_parameters", "layers_to_transform"), (None, [], {})),
    **dict.fromkeys(("rank_pattern", "alpha_pattern", "layer_replication", "alora_invocation_tokens"), (None, [], {})),
    **dict.fromkeys(("arrow_config", "kasa_config", "velora_config", "monteclora_config", "corda_config"), (None, {})),
}  # fmt: skip
"""Entry -> values that mean plain LoRA."""
_BASE_CHANGES = ("pissa", "olora", "corda", "loftq", "lora_ga")
"""Beginnings of init_lora_weights that also change the model's own weights, which the adapter then belongs to."""
_USED = ("use_rslora", *_MUST_BE)
_NEW: dict[str, Any] = {
    "peft_type": "LORA", "task_type": "CAUSAL_LM", "inference_mode": True, "bias": "none", "fan_in_fan_out": False,
    "init_lora_weights": True, "layers_to_transform": None, "layers_pattern": None, "modules_to_save": None, "rank_pattern": {},
    "alpha_pattern": {}, "use_dora": False, "revision": None, "auto_mapping": None,
}  # fmt: skip


def is_peft(folder: Path) -> bool:
    return (Path(folder) / CONFIG).is_file()


def tensor_name(projection: Projection, layer: int, part: str) -> str:
    """Return PEFT's name of a parameter. part: A or B."""
    return f"{_PREFIX}{projection.path.format(n=layer)}.lora_{part}.weight"


def rows_name(module: str) -> str:
    """Return PEFT's name of the trained rows of a table. module: the table's name in Hugging Face."""
    return f"{_PREFIX}{module}.token_adapter.trainable_tokens_delta"


@dataclass(frozen=True)
class PeftAdapter:
    """An opened folder."""

    folder: Path
    lora: Lora
    config: dict[str, Any]
    """The content of adapter_config.json."""
    recorded: Any
    """Hashes of the model's weights, where this project has written the folder; else None."""
    file: SafetensorsFile | PickledFile
    names: Mapping[str, str]
    """Our name of a parameter -> PEFT's."""

    def read(self, name: str) -> Tensor:
        """Return a parameter by our name."""
        return self.file.read(self.names[name])


def open_peft(folder: Path, arch: Architecture) -> PeftAdapter:
    """Open an adapter for a model. Raise CheckpointError, naming file and entry, for what is missing, unsupported or of another shape."""
    folder = Path(folder)
    config = _read_config(folder / CONFIG)
    file = _open_weights(folder)
    targets = _targets(file.path, set(file.tensors), arch)
    lora = _lora(folder / CONFIG, config, targets, _new_tokens(folder / CONFIG, config, arch))
    names = _names(lora, arch)
    shapes = lora.shapes(arch)
    if missing := next((peft for peft in names.values() if peft not in file.tensors), None):
        raise CheckpointError(
            f"{file.path} has no {missing}: adapters in some layers only cannot be used; train all layers"
        )
    for ours, peft in names.items():
        if file.tensors[peft][1] != shapes[ours]:
            raise CheckpointError(
                f"{file.path}: {peft} is {list(file.tensors[peft][1])}, this model with r {lora.rank} needs {list(shapes[ours])}: "
                f"the adapter is of another model"
            )
    recorded = read_json(folder / BASE) if (folder / BASE).is_file() else None
    return PeftAdapter(folder, lora, config, recorded, file, names)


def _open_weights(folder: Path) -> SafetensorsFile | PickledFile:
    """Open the file with the tensors, as PEFT does: the one of safetensors, else the one that its older versions wrote with torch.save."""
    if (folder / WEIGHTS).is_file():
        return SafetensorsFile(folder / WEIGHTS, _REMEDY)
    if (folder / PICKLED).is_file():
        return PickledFile(folder / PICKLED)
    raise CheckpointError(f"{folder} has neither {WEIGHTS} nor {PICKLED}: not a whole PEFT adapter; {_REMEDY}")


def _read_config(path: Path) -> dict[str, Any]:
    if not path.is_file():
        raise CheckpointError(f"{path} is missing: not a PEFT adapter; {_REMEDY}")
    config = read_json(path)
    if not isinstance(config, dict):
        raise CheckpointError(f"{path} is no adapter config; {_REMEDY}")
    for name, known in _MUST_BE.items():
        if config.get(name, known[0]) not in known:
            raise CheckpointError(
                f"{path}: {name} {str(config[name])[:60]}: only plain LoRA can be used; train the adapter without it"
            )
    if new := next(
        (name for name, value in config.items() if name.startswith("use_") and value and name not in _USED), None
    ):
        raise CheckpointError(f"{path}: {new} is not known: only plain LoRA can be used; train the adapter without it")
    began = config.get("init_lora_weights")
    if str(began).lower().startswith(_BASE_CHANGES):
        raise CheckpointError(
            f"{path}: init_lora_weights {str(began)[:60]} has changed the model that the adapter belongs to: save it as plain LoRA, with "
            f"path_initial_model_for_weight_conversion of PEFT's save_pretrained"
        )
    return config


def _targets(path: Path, found: set[str], arch: Architecture) -> tuple[str, ...]:
    """Return the projections that have tensors in the file. Raise CheckpointError for a tensor of anything else."""
    known = {
        tensor_name(one, layer, part): one.name
        for one in projections(arch)
        for layer in range(arch.num_layers)
        for part in "AB"
    } | {rows_name(module): "" for module in tables(arch).values()}
    if strange := sorted(found - known.keys()):
        raise CheckpointError(
            f"{path} has {strange[0]} ({len(strange)} such), which belongs to no linear of this {arch.family} model with "
            f"{counted(arch.num_layers, 'layer')}: the adapter is of another model, or trains more than linears"
        )
    here = {known[name] for name in found}
    return tuple(one.name for one in projections(arch) if one.name in here)


def _new_tokens(path: Path, config: dict[str, Any], arch: Architecture) -> tuple[int, ...]:
    """Return the tokens whose rows are trained. Raise CheckpointError unless they are so in every table of the model."""
    entry, modules = (
        config.get("trainable_token_indices") or [],
        [name.rpartition(".")[2] for name in tables(arch).values()],
    )
    by_module = entry if isinstance(entry, dict) else {modules[0]: entry} if entry else {}
    if not by_module:
        return ()
    each = [by_module.get(name) for name in modules]
    if set(by_module) != set(modules) or not isinstance(each[0], list) or any(tokens != each[0] for tokens in each):
        raise CheckpointError(
            f"{path}: trainable_token_indices {str(entry)[:60]}: tokens have to be trained in {' and '.join(modules)} of this model alike"
        )
    try:
        check_tokens(each[0], arch)
    except ConfigError as error:
        raise CheckpointError(f"{path}: {error}") from error
    return tuple(each[0])


def _lora(path: Path, config: dict[str, Any], targets: tuple[str, ...], tokens: tuple[int, ...]) -> Lora:
    rank, alpha, dropout = config.get("r"), config.get("lora_alpha"), config.get("lora_dropout", 0.0)
    if not targets or type(rank) is not int or not all(isinstance(x, int | float) for x in (alpha, dropout)):
        raise CheckpointError(
            f"{path}: r {rank}, lora_alpha {alpha}, lora_dropout {dropout}: not the values of an adapter; {_REMEDY}"
        )
    lora = Lora(rank, float(alpha or 0), targets, float(dropout), bool(config.get("use_rslora", False)), tokens)
    try:
        check(lora)
    except ConfigError as error:
        raise CheckpointError(f"{path}: {error}") from error
    return lora


def _names(lora: Lora, arch: Architecture) -> dict[str, str]:
    rows = {rows_key(table): rows_name(module) for table, module in tables(arch).items()} if lora.new_tokens else {}
    return rows | {
        one.key(layer, part): tensor_name(one, layer, part)
        for layer in range(arch.num_layers)
        for one in lora.of(arch)
        for part in "AB"
    }


def config_of(
    lora: Lora, arch: Architecture, base_name: str, carried: Mapping[str, Any] | None = None
) -> dict[str, Any]:
    """Return the content of adapter_config.json. carried: of the adapter that training began with, which keeps its other entries."""
    known = dict(carried or _NEW)
    if set(known.get("target_modules") or ()) != set(lora.targets) and not carried:
        known["target_modules"] = sorted(lora.targets)
    alpha = int(lora.alpha) if lora.alpha == int(lora.alpha) else lora.alpha
    known |= {"r": lora.rank, "lora_alpha": alpha, "lora_dropout": lora.dropout, "use_rslora": lora.rs}
    if lora.new_tokens and not carried:
        modules, tokens = [name.rpartition(".")[2] for name in tables(arch).values()], list(lora.new_tokens)
        known["trainable_token_indices"] = dict.fromkeys(modules, tokens) if len(modules) > 1 else tokens
    return known | ({} if carried and not base_name else {"base_model_name_or_path": base_name})


def write_peft(
    folder: Path,
    arch: Architecture,
    lora: Lora,
    weights: Mapping[str, Tensor],
    config: Mapping[str, Any],
    recorded: Any,
) -> None:
    """Write an adapter into a folder. weights: by our names. config: see config_of. recorded: hashes of the model's weights."""
    import json

    from safetensors.torch import save_file

    names = _names(lora, arch)
    tensors = {peft: weights[ours].contiguous() for ours, peft in names.items()}
    save_file(tensors, folder / WEIGHTS, {"format": "pt"})
    (folder / CONFIG).write_text(json.dumps(config, indent=2, sort_keys=True), encoding="utf-8")  # as PEFT writes it
    if recorded is not None:
        write_json(folder / BASE, recorded)
