"""megatron-ft resume-check: compare an uninterrupted run with one that is stopped in the middle and resumed."""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import io
import json
import shutil
import sys
import tempfile
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from megatron_ft.config.cli import Command, run_script
from megatron_ft.config.sections import Checkpointing, Launching
from megatron_ft.config.settings import COMMON, TrainingSettings
from megatron_ft.device import choose_cpu
from megatron_ft.errors import ConfigError, UserError
from megatron_ft.launch.places import is_rank, join_srun


@dataclass
class ResumeCheck:
    """Comparison"""

    check_steps: int = 10
    """number of steps to compare; the second run is stopped and resumed after half of them"""
    resume_tensor_model_parallel_size: int | None = None
    """tensor parallel size after resuming; default: unchanged"""
    resume_pipeline_model_parallel_size: int | None = None
    """pipeline parallel size after resuming; default: unchanged"""
    check_tolerance: float = 1e-4
    """largest accepted difference of a step's loss if the layout changes; if it does not, the runs must be bit-identical"""
    check_processes: int | None = None
    """number of processes to start on this machine's CPU if no launcher has started them; default: TP x PP"""
    work_dir: str | None = field(default=None, metadata={"writes": "folder"})
    """folder for the checkpoints of the runs, with space for three; default: a temporary folder, removed at the end"""


COMMAND = Command(
    name="resume-check",
    summary="check that stopping and resuming does not change a run",
    sections=(ResumeCheck, TrainingSettings),
    examples=(
        "megatron-ft resume-check --config runs/tuned/training.yaml --load runs/tuned",
        "torchrun --nproc_per_node 4 -m megatron_ft resume-check --config runs/tuned/training.yaml --load runs/tuned "
        "--resume_tensor_model_parallel_size 4 --resume_pipeline_model_parallel_size 1",
    ),
    megatron_flags=True,
    common=(
        "check_steps: number of steps to compare",
        "check_processes: number of processes to start",
        "resume_tensor_model_parallel_size: TP after resuming",
        *COMMON,
    ),
)


say = functools.partial(print, flush=True)  # forked ranks end without flushing


class ResumeDiffers(UserError):
    """The resumed run differs from the uninterrupted one."""


def run(check: ResumeCheck, settings: TrainingSettings) -> int:
    """Print the table. Raise ResumeDiffers if a row fails, ConfigError or CheckpointError if the runs cannot start."""
    if check.check_steps < 2:
        raise ConfigError(
            f"--check_steps {check.check_steps}: must be at least 2, one step before the stop and one after it"
        )
    join_srun(settings.launching)
    if is_rank():  # a launcher started the processes
        from megatron_ft.engine.parallel import joined

        with joined():
            return _on_this_rank((check, settings))
    processes = check.check_processes or settings.parallel.model_parallel_size
    choose_cpu()
    from megatron_ft.engine.forked import run_forked

    return run_forked(processes, _on_this_rank, (check, settings))[0]


def _on_this_rank(work: tuple[ResumeCheck, TrainingSettings]) -> int:
    import torch.distributed as dist

    from megatron_ft.log import setup as setup_log

    check, settings = work
    folder: list[Any] = [check.work_dir or tempfile.mkdtemp(prefix="resume-check-") if dist.get_rank() == 0 else None]
    dist.broadcast_object_list(folder, src=0)
    root = Path(folder[0])
    setup_log("WARNING")
    try:
        _three_runs(root, check, settings)
        dist.barrier()
        verdict = [_compared(root, check, settings) if dist.get_rank() == 0 else None]
        dist.broadcast_object_list(verdict, src=0)
    finally:
        setup_log("INFO")  # the runs' log file goes with their folder
        if check.work_dir is None and dist.get_rank() == 0:
            shutil.rmtree(root, ignore_errors=True)
    if verdict[0]:
        raise ResumeDiffers(verdict[0])
    return 0


def _three_runs(root: Path, check: ResumeCheck, settings: TrainingSettings) -> None:
    """Train straight/ from the checkpoint to the end, and resumed/ to the middle and, in a new start, to the end."""
    first = _iteration(settings.checkpointing)
    middle, last = first + check.check_steps // 2, first + check.check_steps
    _say(f"iterations {first + 1} to {last} without interruption ...")
    _finetune(settings, root / "straight", None, last, last)
    _say(f"iterations {first + 1} to {middle}, then resumed to {last} ...")
    _finetune(settings, root / "resumed", None, middle, last)
    there = {
        "tensor_model_parallel_size": check.resume_tensor_model_parallel_size,
        "pipeline_model_parallel_size": check.resume_pipeline_model_parallel_size,
    }
    _finetune(
        settings, root / "resumed", root / "resumed", last, last, {k: v for k, v in there.items() if v is not None}
    )


def _say(line: str) -> None:
    import torch.distributed as dist

    if dist.get_rank() == 0:
        say(line)


def _iteration(checkpointing: Checkpointing) -> int:
    from megatron_ft.checkpoints.folder import describe, find_checkpoint

    found = describe(find_checkpoint(Path(checkpointing.load))).iteration
    return 0 if found == "release" or checkpointing.finetune else int(found)


def _finetune(
    settings: TrainingSettings, save: Path, load: Path | None, until: int, end: int, layout: dict | None = None
) -> None:
    """Run finetune without output until one iteration, with the schedule of a run that continues at least to `end`."""
    from megatron_ft.commands import finetune

    # The table is made from metrics.jsonl, which one rank writes: on a cluster it must be in the shared --save folder.
    s, replace = settings, dataclasses.replace
    one = replace(
        s,
        checkpointing=replace(
            s.checkpointing, save=str(save), load=str(load or s.checkpointing.load), save_interval=None, keep_last=None,
            save_retain_interval=None, auto_resume=False, finetune=s.checkpointing.finetune and load is None,
        ),
        batch=replace(s.batch, train_iters=until, epochs=None),
        optimizer=replace(s.optimizer, lr_decay_iters=s.optimizer.lr_decay_iters or max(s.batch.train_iters, end)),
        logging=replace(
            s.logging, run_dir=None, tensorboard_dir=None, wandb_logger=False, report=False, eval_interval=None,
            log_interval=10**9, sample_prompts=None, sample_interval=None, sample_chats=0,
        ),
        parallel=replace(s.parallel, **(layout or {})),
        launching=Launching(),
    )  # fmt: skip
    with contextlib.redirect_stdout(io.StringIO()):
        code = finetune.run(one)
    if code:
        raise ConfigError(
            f"the run was stopped by a signal (exit code {code}): nothing was compared; run the command again"
        )


def _compared(root: Path, check: ResumeCheck, settings: TrainingSettings) -> str:
    """Print the table. Return the difference as a message, "" if there is none."""
    from megatron_ft.checkpoints.verify import tensor_hashes

    parallel = settings.parallel
    sizes = (parallel.tensor_model_parallel_size, parallel.pipeline_model_parallel_size)
    there = (check.resume_tensor_model_parallel_size or sizes[0], check.resume_pipeline_model_parallel_size or sizes[1])
    straight, resumed = _steps(root / "straight"), _steps(root / "resumed")
    say(f"stopped in TP{sizes[0]} x PP{sizes[1]}, resumed in TP{there[0]} x PP{there[1]}")
    say(f"{'iteration':>9} {'uninterrupted':>16} {'resumed':>16} {'difference':>11}  samples")
    middle = min(straight) + check.check_steps // 2 - 1
    largest, same_samples = 0.0, True
    for iteration, one in straight.items():
        other = resumed[iteration]
        apart = abs(one["train/loss"] - other["train/loss"])
        alike = one["train/samples_hash"] == other["train/samples_hash"]
        largest, same_samples = max(largest, apart), same_samples and alike
        say(
            f"{iteration:9d} {one['train/loss']:16.9f} {other['train/loss']:16.9f} {apart:11.1e}  "
            f"{'same' if alike else 'DIFFER'} {one['train/samples_hash'][:8]}{'   <- stopped here' if iteration == middle else ''}"
        )
    if not same_samples:
        return "the resumed run used other samples than the uninterrupted one: see the table; report it with the command line"
    if sizes != there:
        say(
            f"the layout changes: losses may differ by {check.check_tolerance:g}, the largest difference is {largest:.1e}"
        )
        far = f"losses differ by {largest:.1e}, more than --check_tolerance {check.check_tolerance:g}; increase it for bf16"
        return far if largest > check.check_tolerance else ""
    newest = [next((root / name).glob(f"iter_{max(straight):07d}")) for name in ("straight", "resumed")]
    one, other = (tensor_hashes(folder) for folder in newest)
    wrong = sorted(name for name in one.keys() | other.keys() if one.get(name) != other.get(name))
    say(
        f"tensors of the last checkpoint, optimizer and random states included: {len(one)}, of which {len(wrong)} differ"
    )
    if wrong or largest:
        return f"not bit-identical: losses differ by up to {largest:.1e}, tensors that differ: {len(wrong)}, first {wrong[:1]}; report it"
    say("the resumed run and the uninterrupted run are bit-identical")
    return ""


def _steps(folder: Path) -> dict[int, dict]:
    """Return iteration -> its line of metrics."""
    lines = map(json.loads, (folder / "metrics.jsonl").read_text(encoding="utf-8").splitlines())
    return {line["iteration"]: line for line in lines if "train/loss" in line}


if __name__ == "__main__":
    sys.exit(run_script(COMMAND, run))
