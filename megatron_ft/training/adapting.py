"""The adapters of a run: their values, and the checkpoint with the frozen weights. Without torch."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import TYPE_CHECKING, Any

from megatron_ft.adapters import spec
from megatron_ft.adapters.find import find_base
from megatron_ft.adapters.spec import Lora
from megatron_ft.checkpoints.folder import CheckpointConfig, check_sizes, describe, refuse_quantised
from megatron_ft.config.sections import Adapters
from megatron_ft.config.settings import TrainingSettings
from megatron_ft.errors import ConfigError
from megatron_ft.models.architecture import Architecture
from megatron_ft.models.families import family_of
from megatron_ft.models.pipeline import split_layers
from megatron_ft.models.quantised import check_blocks

if TYPE_CHECKING:
    from megatron_ft.adapters.peft_files import PeftAdapter


@dataclasses.dataclass(frozen=True)
class Adapting:
    """base: folder of the checkpoint with the frozen weights. described: its description. recorded: their hashes, if adapters that are
    loaded know them. peft: the adapter that a new run begins with. carried: adapter_config.json of the one that the run began with.
    """

    lora: Lora
    base: Path
    described: CheckpointConfig
    recorded: Any = None
    peft: PeftAdapter | None = None
    carried: Any = None
    nf4: bool = False
    """The linears of the base are quantised after it is loaded."""

    def entry(self, hashes: dict[str, str]) -> dict[str, Any]:
        """Return the entry of the run's checkpoints. hashes: of the base's weights."""
        carried = {} if self.carried is None else {"peft": self.carried}
        precision = {"precision": "nf4"} if self.nf4 else {}
        base = {"path": str(self.base.resolve()), "weights": hashes, **precision}
        return {**self.lora.to_dict(), "base": base, **carried}


def find_adapting(
    settings: TrainingSettings, described: CheckpointConfig, folder: Path, starts_anew: bool
) -> Adapting | None:
    """Return the adapters of a run that begins from the checkpoint in `folder`; None: it trains the model itself. Raise UserError."""
    arch, section = described.architecture, settings.adapters
    if described.adapter is not None:
        return _continued(settings, described, folder)
    peft = _opened(section, arch)
    added = list(described.tokenizer.get("added_tokens", {}).values())
    lora = spec.from_settings(section, arch, peft.lora if peft else None, added)
    if lora is None:
        refuse_quantised(folder, described)
        if section.base_precision:
            raise ConfigError(f"--base_precision {section.base_precision} is for adapters: add --lora_rank, or drop it")
        return None
    nf4 = bool(section.base_precision) and described.quantization is None
    _check_blocks(settings, described, nf4)
    _check(settings, lora, arch)
    if section.base:
        raise ConfigError(
            f"--base {section.base}: --load holds the model itself, to which the adapters are added: drop --base"
        )
    if not starts_anew:
        raise ConfigError(
            f"{folder} is the state of a run that trained the model itself: add --finetune to train adapters of its weights, or choose "
            f"another --save"
        )
    recorded, carried = (peft.recorded, peft.config) if peft else (None, None)
    return Adapting(lora, folder, described, recorded, peft, carried, nf4)


def _opened(section: Adapters, arch: Architecture) -> PeftAdapter | None:
    if not section.adapter:
        return None
    from megatron_ft.adapters.peft_files import open_peft  # imports torch, only if there is one

    return open_peft(Path(section.adapter), arch)


def _continued(settings: TrainingSettings, described: CheckpointConfig, folder: Path) -> Adapting:
    """Return the adapters of a run that begins from a checkpoint of adapters."""
    entry, section = described.adapter or {}, settings.adapters
    if section.adapter and not settings.checkpointing.auto_resume:
        raise ConfigError(f"--adapter {section.adapter}: {folder} already holds adapters: drop --adapter")
    lora = spec.from_settings(section, described.architecture, Lora.from_dict(entry, described.architecture))
    assert lora is not None
    _check(settings, lora, described.architecture)
    base = find_base(described, folder, section.base, settings.checkpointing.load)
    found, split = describe(base), split_layers(described.architecture.num_layers, settings.parallel)
    check_sizes(base, found, settings.parallel.tensor_model_parallel_size, split.stages, split)
    nf4 = found.quantization is None and "nf4" in (section.base_precision, entry["base"].get("precision"))
    _check_blocks(settings, found, nf4)
    return Adapting(lora, base, found, entry["base"]["weights"], carried=entry.get("peft"), nf4=nf4)


def _check_blocks(settings: TrainingSettings, described: CheckpointConfig, nf4: bool) -> None:
    """Raise ConfigError unless the slices of a base that is to be quantised are whole blocks."""
    if nf4:
        arch = described.architecture
        check_blocks(arch, family_of(arch).rules(arch), settings.parallel.tensor_model_parallel_size)


def _check(settings: TrainingSettings, lora: Lora, arch: Architecture) -> None:
    checkpointing = settings.checkpointing
    if settings.optimizer.unfrozen_parameters:
        raise ConfigError("--unfrozen_parameters and adapters (--lora_rank) both say what is trained: drop one of them")
    if checkpointing.save and checkpointing.ckpt_format == "torch":
        raise ConfigError("--ckpt_format torch cannot hold adapters alone: save with --ckpt_format torch_dist")
    in_stages = arch.tied_embeddings and settings.parallel.pipeline_model_parallel_size > 1
    if lora.new_tokens and in_stages and settings.kernels.overlap_grad_reduce:
        raise ConfigError(
            "--train_new_tokens sums gradients of tied embeddings over the first and last stage: drop --overlap_grad_reduce"
        )
