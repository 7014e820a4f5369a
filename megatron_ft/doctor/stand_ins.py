"""The tiny model as a checkpoint, and shards for it: what the commands that are tried read."""

from __future__ import annotations

from pathlib import Path

from megatron_ft.checkpoints.folder import CheckpointConfig
from megatron_ft.doctor.ranks import run_module
from megatron_ft.doctor.small_model import LLAMA, SEQ_LENGTH
from megatron_ft.errors import UserError
from megatron_ft.rehearsal import make_up


def finetune(folder: Path, *words: object, iters: int, rows: int = 4) -> list[str]:
    """The words of a `megatron-ft finetune` over them, made where they are not there yet. Raises UserError where that fails."""
    return ["megatron_ft", "finetune", *settings(folder, iters, rows), *map(str, words)]


def settings(folder: Path, iters: int, rows: int = 4) -> list[str]:
    """What all runs have in common. rows: in a step."""
    model, shards = folder / "model", folder / "chats-train"
    if not model.is_dir():
        # On the CPU and in a process of its own: it forks, which one that has touched a GPU must not.
        job = ["megatron_ft.doctor.ranks", "--job", "stand_ins:make", "--folder", str(folder)]
        ended = run_module(job, 90, MEGATRON_FT_DEVICE="cpu")
        if ended.code != 0:
            raise UserError(f"the tiny model could not be made: {ended.said}")
    return [
        "--load", str(model), "--data_path", str(shards), "--seq_length", str(SEQ_LENGTH), "--micro_batch_size", "1",
        "--global_batch_size", str(rows), "--lr", "1e-4", "--train_iters", str(iters), "--log_interval", "1", "--no_report",
    ]  # fmt: skip


def make(folder: Path) -> None:
    make_up.shards(folder / "chats-train", LLAMA.vocab_size, {})
    make_up.model(
        folder / "model", CheckpointConfig(LLAMA, "torch_dist", 1, 1, LLAMA.vocab_size, "release", "bf16"), None
    )
