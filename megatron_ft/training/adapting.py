"""The adapters of a run: their values, and the checkpoint with the frozen weights. Without torch."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

from megatron_ft.adapters import spec
from megatron_ft.adapters.find import find_base
from megatron_ft.adapters.spec import Lora
from megatron_ft.checkpoints.folder import CheckpointConfig, check_sizes, describe
from megatron_ft.config.settings import TrainingSettings
from megatron_ft.errors import ConfigError
from megatron_ft.models.pipeline import PipelineSplit, split_layers


@dataclasses.dataclass(frozen=True)
class Adapting:
    """base: folder of the checkpoint with the frozen weights. described: its description. recorded: their hashes, if adapters of an earlier
    run are loaded.
    """

    lora: Lora
    base: Path
    described: CheckpointConfig
    recorded: Any = None

    def entry(self, hashes: dict[str, str]) -> dict[str, Any]:
        """Return the entry of the run's checkpoints. hashes: of the base's weights."""
        return {**self.lora.to_dict(), "base": {"path": str(self.base.resolve()), "weights": hashes}}


def find_adapting(
    settings: TrainingSettings, described: CheckpointConfig, folder: Path, starts_anew: bool
) -> Adapting | None:
    """Return the adapters of a run that begins from the checkpoint in `folder`; None: it trains the model itself. Raise UserError."""
    arch, section = described.architecture, settings.adapter
    stored = None if described.adapter is None else Lora.from_dict(described.adapter, arch)
    lora = spec.from_settings(section, arch, stored)
    if lora is None:
        return None
    _check(settings)
    split = split_layers(arch.num_layers, settings.parallel)
    if stored is None:
        if section.base:
            raise ConfigError(
                f"--base {section.base}: --load holds the model itself, to which new adapters are added: drop --base"
            )
        if not starts_anew:
            raise ConfigError(
                f"--lora_rank {lora.rank}: {folder} is the state of a run that trained the model itself: add --finetune to add "
                f"adapters to its weights, or choose another --save"
            )
        return Adapting(lora, folder, described)
    assert described.adapter is not None
    base, found = _base(settings, described, folder, split)
    return Adapting(lora, base, found, described.adapter["base"]["weights"])


def _check(settings: TrainingSettings) -> None:
    checkpointing = settings.checkpointing
    if settings.optimizer.unfrozen_parameters:
        raise ConfigError("--unfrozen_parameters and adapters (--lora_rank) both say what is trained: drop one of them")
    if checkpointing.save and checkpointing.ckpt_format == "torch":
        raise ConfigError("--ckpt_format torch cannot hold adapters alone: save with --ckpt_format torch_dist")


def _base(
    settings: TrainingSettings, described: CheckpointConfig, folder: Path, split: PipelineSplit
) -> tuple[Path, CheckpointConfig]:
    """Return the checkpoint with the model of stored adapters, and its description."""
    base = find_base(described, folder, settings.adapter.base, settings.checkpointing.load)
    found = describe(base)
    check_sizes(base, found, settings.parallel.tensor_model_parallel_size, split.stages, split)
    return base, found
