"""The tiny model as a checkpoint, and shards for it, for checks that run commands."""

from __future__ import annotations

from pathlib import Path

from megatron_ft import device
from megatron_ft.checkpoints.folder import CheckpointConfig
from megatron_ft.doctor.ranks import run_module
from megatron_ft.doctor.small_model import LLAMA, SEQ_LENGTH
from megatron_ft.errors import UserError
from megatron_ft.rehearsal import make_up


def finetune(folder: Path, *words: object, iters: int, rows: int = 4) -> list[str]:
    """Return the command line of a `finetune` run with them. Write them first if they do not exist; raise UserError on failure."""
    return ["megatron_ft", "finetune", *settings(folder, iters, rows), *map(str, words)]


def settings(folder: Path, iters: int, rows: int = 4) -> list[str]:
    """Return the flags that all runs have in common. rows: per step."""
    model, shards = folder / "model", folder / "chats-train"
    if not model.is_dir():
        # In a separate process on the CPU: it forks, which is not possible after a GPU was used.
        job = ["megatron_ft.doctor.ranks", "--job", "stand_ins:make", "--folder", str(folder)]
        ended = run_module(job, 90, **device.CPU)
        if ended.code != 0:
            raise UserError(f"the tiny model could not be written: {ended.reason}")
    return [
        "--load", str(model), "--data_path", str(shards), "--seq_length", str(SEQ_LENGTH), "--micro_batch_size", "1",
        "--global_batch_size", str(rows), "--lr", "1e-4", "--train_iters", str(iters), "--log_interval", "1", "--no_report",
    ]  # fmt: skip


def make(folder: Path) -> None:
    make_up.shards(folder / "chats-train", LLAMA.vocab_size, {})
    make_up.model(
        folder / "model", CheckpointConfig(LLAMA, "torch_dist", 1, 1, LLAMA.vocab_size, "release", "bf16"), None
    )
