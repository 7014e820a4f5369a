"""Generates a small checkpoint of random weights, and shards of random tokens, in place of the real ones."""

from __future__ import annotations

import os
import shutil
import sys
import traceback
from pathlib import Path
from typing import Any

import numpy as np

from megatron_ft.checkpoints.folder import (
    TOKENIZER_FOLDER,
    CheckpointConfig,
    iteration_folder,
    write_config,
    write_tracker,
)
from megatron_ft.data.shards import ShardWriter
from megatron_ft.digests import write_digests
from megatron_ft.errors import UserError

_SAMPLES, _LONGEST = 96, 100
_SEED = 1234
_ASSISTANT, _USER = 2, 1  # as in data/roles.py


def shards(prefix: Path, vocab_size: int, tokenizer: dict[str, Any]) -> None:
    """Write chats of one question and one answer with random tokens, the same in every call."""
    draw = np.random.default_rng(_SEED)
    prefix.parent.mkdir(parents=True, exist_ok=True)
    with ShardWriter(prefix, vocab_size, tokenizer) as writer:
        for length in draw.integers(20, _LONGEST, _SAMPLES):
            roles = np.where(np.arange(length) < length // 2, _USER, _ASSISTANT)
            writer.add(draw.integers(0, vocab_size, length), roles)


def model(root: Path, config: CheckpointConfig, tokenizer: Path | None) -> None:
    """Write a converted checkpoint, in a separate process with its own process groups.

    config: the checkpoint's description. tokenizer: folder whose files are copied; None: no tokenizer.
    """
    pid = os.fork()
    if pid == 0:
        code = 1
        try:
            _make(root, config, tokenizer)
            code = 0
        except BaseException:
            traceback.print_exc()
        finally:
            sys.stderr.flush()
            os._exit(code)
    if os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]):
        raise UserError(f"{root}: the small model could not be written; the output above shows why")


def _make(root: Path, config: CheckpointConfig, tokenizer: Path | None) -> None:
    for name in ("RANK", "WORLD_SIZE", "LOCAL_RANK", "MASTER_ADDR", "MASTER_PORT"):
        os.environ.pop(name, None)
    import torch

    from megatron_ft.engine.parallel import process_groups

    with process_groups() as layout, torch.no_grad():
        from megatron.core import dist_checkpointing

        from megatron_ft.checkpoints.load import sharded_weights
        from megatron_ft.checkpoints.writer import save_tensors
        from megatron_ft.models.build import BuildOptions, build_model

        dtype = torch.bfloat16 if config.dtype == "bf16" else torch.float32
        built = build_model(config.architecture, layout, BuildOptions(dtype=dtype))
        torch.manual_seed(_SEED)
        for weight in built.parameters():
            weight.normal_(std=0.02) if weight.ndim > 1 else weight.fill_(1.0)
        folder = iteration_folder(root, "release")
        folder.mkdir(parents=True)
        dist_checkpointing.save({"model": sharded_weights(built)}, str(folder))
        if not (folder / "common.pt").exists():  # megatron-core 0.19 has what it holds among the tensors
            save_tensors({"iteration": 0}, folder / "common.pt")
        write_config(folder, config)
        if tokenizer is not None and tokenizer.is_dir():
            shutil.copytree(tokenizer, folder / TOKENIZER_FOLDER)
        write_digests(folder)
        write_tracker(root, "release")
