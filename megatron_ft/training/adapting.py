"""The adapters of a run: their values, and the checkpoint with the frozen weights. Without torch."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import TYPE_CHECKING, Any

from megatron_ft.adapters import spec
from megatron_ft.adapters.find import find_base
from megatron_ft.adapters.spec import Lora
from megatron_ft.checkpoints.folder import CheckpointConfig, check_sizes, describe
from megatron_ft.config.sections import Adapters
from megatron_ft.config.settings import TrainingSettings
from megatron_ft.errors import ConfigError
from megatron_ft.models.architecture import Architecture
from megatron_ft.models.pipeline import split_layers

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

    def entry(self, hashes: dict[str, str]) -> dict[str, Any]:
        """Return the entry of the run's checkpoints. hashes: of the base's weights."""
        carried = {} if self.carried is None else {"peft": self.carried}
        return {**self.lora.to_dict(), "base": {"path": str(self.base.resolve()), "weights": hashes}, **carried}


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
        return None
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
    return Adapting(lora, folder, described, peft.recorded if peft else None, peft, peft.config if peft else None)


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
    return Adapting(lora, base, found, entry["base"]["weights"], carried=entry.get("peft"))


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
