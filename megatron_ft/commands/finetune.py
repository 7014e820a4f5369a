"""megatron-ft finetune: train a checkpoint on role-labelled shards, in any layout."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import TYPE_CHECKING

from megatron_ft.config.checks import check_training
from megatron_ft.config.cli import Command, run_script
from megatron_ft.config.sections import (
    TRAINING,
    Batch,
    Checkpointing,
    Data,
    Logging,
    Numerics,
    Optimizer,
    Parallelism,
)

if TYPE_CHECKING:
    from megatron_ft.models.checkpoint_layout import CheckpointConfig

COMMAND = Command(
    name="finetune",
    summary="train a checkpoint on pretokenized chats",
    sections=TRAINING,
    examples=(
        "torchrun --nproc_per_node 4 -m megatron_ft finetune --load runs/model --data_path data/chats-train "
        "--tensor_model_parallel_size 2 --pipeline_model_parallel_size 2 --train_iters 100 --save runs/tuned",
        "megatron-ft finetune --config finetune.yaml --lr 2e-5",
    ),
)


def run(
    checkpointing: Checkpointing, data: Data, batch: Batch, parallel: Parallelism,
    optimizer: Optimizer, numerics: Numerics, logging: Logging,
) -> int:  # fmt: skip
    """Check, build, load, train, save. Raises UserError for anything the user can put right."""
    from megatron_ft.models.checkpoint_layout import check_sizes, check_training_state, describe, find_checkpoint
    from megatron_ft.parallel import process_groups, world_size
    from megatron_ft.training import datasets

    sections = (checkpointing, data, batch, parallel, optimizer, numerics, logging)
    check_training(*sections, world_size=world_size())
    # Whatever can be told without torch is told before the processes wait for each other.
    source = find_checkpoint(Path(checkpointing.load))
    described = describe(source)
    check_sizes(source, described, parallel.tensor_model_parallel_size, parallel.pipeline_model_parallel_size)
    if not _starts_anew(described, checkpointing):
        check_training_state(source, described)
    train_set, valid_set = datasets.make_datasets(data, described)
    described = datasets.with_chat_format(described, train_set)
    with process_groups(
        parallel.tensor_model_parallel_size,
        parallel.pipeline_model_parallel_size,
        parallel.sequence_parallel,
        parallel.distributed_timeout_minutes,
        data.seed,
    ) as layout:
        _train(layout, source, described, train_set, valid_set, *sections)
    return 0


def _train(
    layout, source, described, train_set, valid_set, checkpointing, data, batch, parallel, optimizer, numerics, logging
) -> None:
    from megatron_ft import device
    from megatron_ft.log import logger
    from megatron_ft.models.checkpoint_layout import vocab_rows
    from megatron_ft.models.load import load_weights
    from megatron_ft.training import checkpoint, setup
    from megatron_ft.training.loop import Run, train
    from megatron_ft.training.optimizer import make_optimizer, make_schedule
    from megatron_ft.training.step import Stepper

    log = logger("finetune")
    model = setup.make_model(described.architecture, layout, data, parallel, numerics, vocab_rows(described))
    adam = make_optimizer([model], optimizer, numerics, parallel.use_distributed_optimizer)
    schedule = make_schedule(adam, optimizer, batch)
    stepper = Stepper(
        model, layout, batch.micro_batch_size, batch.global_batch_size or batch.micro_batch_size * layout.dp_size
    )
    model.config.finalize_model_grads_func = stepper.weight.finalize

    if _starts_anew(described, checkpointing):
        load_weights(source, described, setup.bare(model), layout)
        adam.reload_model_params()
        progress = checkpoint.Progress()
    else:
        progress = checkpoint.resume(source, setup.bare(model), adam, schedule, layout, data.seed)
    log.info(f"{layout} on {device.describe()}; weights from {source}")
    if progress.iteration:
        log.info(f"resuming at iteration {progress.iteration}, {progress.consumed_samples} rows consumed")
    rows, fill = len(train_set.epoch_rows(0)), train_set.fill()
    log.info(f"{train_set.num_samples} samples in {rows} rows of {data.seq_length}, {fill:.1%} of positions filled")

    save_to = Path(checkpointing.save) if checkpointing.save else None
    train(
        Run(
            stepper, train_set, valid_set, adam, schedule,
            hooks=_hooks(layout, logging, batch, save_to),
            save=save_to and (
                lambda now: checkpoint.save(save_to, source, described, setup.bare(model), adam, schedule, now, layout)
            ),
            train_iters=batch.train_iters, save_interval=checkpointing.save_interval,
            eval_interval=logging.eval_interval, eval_iters=logging.eval_iters,
        ),
        progress,
    )  # fmt: skip


def _starts_anew(described: CheckpointConfig, checkpointing: Checkpointing) -> bool:
    """Whether only weights are taken: converted ones, or because --finetune says so."""
    return described.iteration == "release" or checkpointing.finetune


def _hooks(layout, logging: Logging, batch: Batch, save_to: Path | None) -> list:
    from megatron_ft.training.hooks import Console, MetricsFile

    if not layout.is_reporter:
        return []
    folder = Path(logging.run_dir) if logging.run_dir else save_to
    return [Console(batch.train_iters, logging.log_interval)] + ([MetricsFile(folder)] if folder else [])


if __name__ == "__main__":
    sys.exit(run_script(COMMAND, run))
