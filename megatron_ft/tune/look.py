"""What tune looks at before it chooses: the model, the machine, and the chats once they are shards."""

from __future__ import annotations

import os
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from megatron_ft import device
from megatron_ft.checkpoints.folder import export_dtype, hf_entries, is_export
from megatron_ft.data.fingerprint import fingerprint
from megatron_ft.data.shards import open_shards
from megatron_ft.data.template_files import template_sources
from megatron_ft.errors import ConfigError
from megatron_ft.models.architecture import Architecture
from megatron_ft.planner import known
from megatron_ft.planner.figures import whole_model
from megatron_ft.wording import counted, human

GPUS_PER_NODE = 8
USUAL_GPU = "a100-80gb"


@dataclass(frozen=True)
class Model:
    """A Hugging Face model folder. has_template: whether its tokenizer has a chat template. identity: changes with its files."""

    folder: Path
    arch: Architecture
    parameters: int
    dtype: str
    has_template: bool
    identity: str

    def __str__(self) -> str:
        size = human(self.parameters)
        arch = self.arch
        return f"{arch.family}, {size} parameters, {counted(arch.num_layers, 'layer')}, {arch.max_position_embeddings:,} positions"


def look_at_model(folder: str) -> Model:
    """Return what is known of a model. Raise ConfigError for a folder that holds none."""
    path = Path(folder)
    if not path.is_dir():
        raise ConfigError(f"{folder}: no such folder; give the folder of a Hugging Face model (with config.json)")
    if not is_export(path) or "model_type" not in hf_entries(path):
        raise ConfigError(
            f"{folder}: no Hugging Face model (config.json with a model_type); of a checkpoint, megatron-ft megatron-to-hf makes one"
        )
    arch = known.architecture(folder)
    dtype = export_dtype(path) or "float32"
    return Model(path, arch, whole_model(arch), dtype, bool(template_sources(path)), _identity(path))


def _identity(folder: Path) -> str:
    """Return a hash of the names, sizes and times of a folder's files."""
    files = [(path.name, path.stat()) for path in sorted(folder.iterdir()) if path.is_file()]
    return fingerprint([[name, stat.st_size, stat.st_mtime_ns] for name, stat in files])


@dataclass(frozen=True)
class Machine:
    """gpus: to train on, 0: the CPU. memory: of each, in bytes. kind: name of its type in the planner. is_here: it is this machine."""

    gpus: int
    memory: float
    kind: str
    cores: int
    is_here: bool = True

    def __str__(self) -> str:
        if not self.gpus:
            return f"no GPU, {counted(self.cores, 'CPU core')}"
        where = "" if self.is_here else ", not this machine"
        return f"{counted(self.gpus, 'GPU')} of {self.memory / 1e9:.0f} GB, planned as {self.kind}{where}"

    @property
    def per_node(self) -> int:
        return min(self.gpus, GPUS_PER_NODE)


def look_at_machine(gpus: int | None, kind: str | None, dry_run: bool) -> Machine:
    """Return where to train. gpus: that were asked for; None: all of this machine. Raise ConfigError for more than there are.

    dry_run: the commands are for another machine where this one has fewer GPUs.
    """
    memories = device.memories()
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    if gpus is not None and gpus < 1:
        raise ConfigError(f"--gpus {gpus}: must be at least 1; without the flag all GPUs of this machine are used")
    if gpus is not None and gpus > len(memories):
        if not dry_run:
            there = f"only {len(memories)}" if memories else "no GPU"
            raise ConfigError(
                f"--gpus {gpus}: this machine has {there}; --dry_run prints the commands for a machine that has them"
            )
        if gpus > GPUS_PER_NODE and gpus % GPUS_PER_NODE:
            raise ConfigError(f"--gpus {gpus}: more than {GPUS_PER_NODE} must be a multiple of it, whole machines")
        name = kind or _kind()
        return Machine(gpus, known.gpu(name).memory * 1e9, name, cores, is_here=False)
    if not memories:
        return Machine(0, 0, "", cores)
    return Machine(gpus or len(memories), min(memories), kind or _kind(), cores)


def _kind() -> str:
    """Return the planner's name of this machine's GPUs; the usual one for those that it does not know."""
    name = (device.gpu_name() or "").lower()
    return next((kind for kind in known.GPUS if kind.partition("-")[0] in name), USUAL_GPU)


@dataclass(frozen=True)
class Chats:
    """The chats as shards. lengths: tokens of each training sample, [samples]. held_out: number of validation samples."""

    prefix: str
    lengths: np.ndarray
    held_out: int
    trained_on: float

    def __str__(self) -> str:
        return (
            f"{len(self.lengths) + self.held_out:,}: {len(self.lengths):,} to train on, {self.held_out:,} held out; "
            f"{self.lengths.sum():,} tokens, {self.trained_on:.0%} trained on; the longest has {self.lengths.max():,}"
        )


def look_at_chats(prefix: str, chats: list[str]) -> Chats:
    """Return what is known of shards that pretokenize has made. Raise ConfigError if no chat is held out."""
    train = open_shards(f"{prefix}-train")
    if not Path(f"{prefix}-val-manifest.json").is_file():
        raise ConfigError(f"{' '.join(chats)}: only one chat can be trained on; two are needed, since one is held out")
    counts = train.manifest.counts
    share = counts["tokens_by_role"].get("assistant", 0) / max(1, counts["tokens"])
    return Chats(prefix, np.asarray(train.lengths), len(open_shards(f"{prefix}-val")), share)
