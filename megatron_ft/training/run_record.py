"""The record of a run: one entry per start in run.json, in the run's folder, for the report and for people. Training never reads it.

It uses the model only as modules with parameters and numbered layers.
"""

from __future__ import annotations

import platform
import socket
from collections.abc import Sequence
from datetime import UTC, datetime
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

from megatron_ft import __version__, device, files
from megatron_ft.checkpoints.folder import CheckpointConfig
from megatron_ft.config.command import command_line
from megatron_ft.config.sections import Data
from megatron_ft.data.loader import ChatDataset
from megatron_ft.data.roles import ALL_NAMES
from megatron_ft.data.trained_on import weights_of
from megatron_ft.engine.parallel import Layout
from megatron_ft.quantization.frozen import parameters
from megatron_ft.training.datasets import FATE_OF_OVER_LONG

RUN = "run.json"
FORMAT_VERSION = 1
PACKAGES = ("torch", "megatron-core", "transformers", "numpy", "flash-attn", "transformer-engine", "apex")


def start_of_run(
    chunks: Sequence[Any], layout: Layout, described: CheckpointConfig, data: Data, train_set: ChatDataset,
    valid_set: ChatDataset | None, source: Path, iteration: int, train_iters: int,
) -> dict[str, Any]:  # fmt: skip
    """Return one start of a run as plain values. chunks: this rank's parts of the model. A collective: all ranks call it."""
    arch = described.architecture
    return {
        "time": datetime.now(UTC).isoformat(timespec="seconds"),
        "command": command_line(),
        "from": str(source),
        "iteration": iteration,
        "train_iters": train_iters,
        "layout": {
            "text": str(layout), "world_size": layout.world_size, "tensor": layout.tp_size,
            "pipeline": layout.pp_size, "data": layout.dp_size, "sequence_parallel": layout.sequence_parallel,
        },
        "ranks": _ranks(chunks, layout),
        "model": {
            "family": arch.family, "layers": arch.num_layers, "hidden": arch.hidden_size, "vocabulary": arch.vocab_size,
            "positions": arch.max_position_embeddings, "chat_format": described.chat_format,
        },
        "data": _data(data, train_set, valid_set),
        "device": device.describe(),
        "versions": versions(),
    }  # fmt: skip


def record(folder: Path, start: dict[str, Any]) -> None:
    """Add a start to FOLDER/run.json; a file that cannot be read is replaced."""
    path = folder / RUN
    try:
        starts = files.read_json(path)["starts"] if path.is_file() else []
    except Exception:  # a damaged record must not prevent training
        starts = []
    files.write_json(path, {"format_version": FORMAT_VERSION, "starts": [*starts, start]})


def versions() -> dict[str, str]:
    """Return the versions of the packages that matter: package -> version."""
    found = {"megatron_ft": __version__, "python": platform.python_version()}
    for name in PACKAGES:
        try:
            found[name] = version(name)
        except PackageNotFoundError:
            continue
    return found


def _ranks(chunks: Sequence[Any], layout: Layout) -> list[dict[str, Any]]:
    """Return position, layers (counted from 0) and parameters of every rank, replicas of the data-parallel group included."""
    import torch.distributed as dist

    layers = [layer.layer_number - 1 for chunk in chunks for layer in chunk.decoder.layers]
    own = {
        "rank": layout.rank, "tensor": layout.tp_rank, "pipeline": layout.pp_rank, "data": layout.dp_rank,
        "host": socket.gethostname(), "layers": layers,
        "embedding": any(getattr(chunk, "pre_process", False) for chunk in chunks),
        "output": any(getattr(chunk, "post_process", False) for chunk in chunks),
        "parameters": sum(parameters(chunk) for chunk in chunks),
    }  # fmt: skip
    everyone: list[Any] = [None] * layout.world_size
    dist.all_gather_object(everyone, own)
    return everyone


def _data(data: Data, train_set: ChatDataset, valid_set: ChatDataset | None) -> dict[str, Any]:
    weights = weights_of(data)
    return {
        "train": [str(shard.prefix) for shard in train_set.shards],
        "valid": [str(shard.prefix) for shard in valid_set.shards] if valid_set else [],
        "samples": train_set.num_samples,
        "rows": len(train_set.epoch_rows(0)),
        "seq_length": train_set.seq_length,
        "filled": train_set.fill(),
        "packed": train_set.packed,
        "over_long": train_set.over_long,
        "fate_of_over_long": FATE_OF_OVER_LONG[data.over_long],
        "loss_weights": dict(zip(ALL_NAMES, weights.tolist(), strict=True)),
        "marked_loss_weight": data.marked_loss_weight,
    }
