"""Jobs that run the 70B script, as it is, on a small model; how they are disturbed, and what they leave."""

from __future__ import annotations

import contextlib
import json
import os
import re
import signal
import sys
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

from benchmarks.slurm_cluster import ENDED, Cluster, ClusterError
from tests.errors.conftest import ROOT

SCRIPT = ROOT / "examples" / "oasst_llama2_70b" / "stage1.sbatch"
STEPS = 40
SAVES = 5


@dataclass(frozen=True)
class Shop:
    """What jobs need: paths."""

    tokenizer: Path
    checkpoint: Path
    shards: str


class Job:
    """The 70B script as a job of this cluster, on a small model."""

    def __init__(self, cluster: Cluster, shop: Shop, folder: Path, *flags, **options):
        """flags: of finetune, after the script's own. options: of sbatch."""
        self.cluster, self.folder = cluster, folder
        self.save, self.logs = folder / "save", folder / "logs"
        environment = {
            "SAVE": str(self.save), "LOGS": str(self.logs), "PYTHON": sys.executable, "GPUS_PER_NODE": "2",
            "MEGATRON_FT_DEVICE": "cpu", "OMP_NUM_THREADS": "1", "WANDB_MODE": "offline",
        }  # fmt: skip
        words = [
            "--tensor_model_parallel_size", 2, "--pipeline_model_parallel_size", 2, "--load", shop.checkpoint,
            "--data_path", shop.shards, "--vocab_file", shop.tokenizer, "--max_position_embeddings", 128,
            "--seq_length", 128, "--global_batch_size", 4, "--micro_batch_size", 1, "--train_iters", STEPS,
            "--save_interval", SAVES, "--lr_warmup_iters", 2, "--lr", "1e-3", "--no_wandb_logger", *flags,
        ]  # fmt: skip
        self._words, self._options = words, {"nodes": 2, "cwd": ROOT, "env": environment} | options
        self.submit()

    def submit(self) -> None:
        """Again: as another job of the same run."""
        self.number = self.cluster.submit(SCRIPT, *self._words, **self._options)
        self._requeued = 0

    @property
    def output(self) -> str:
        return self.cluster.output(self.number)

    def wait(self, seconds: float = 120) -> tuple[str, str]:
        """(state, exit code as scontrol has it)."""
        return self.cluster.wait(self.number, seconds)

    def metrics(self) -> dict[int, dict]:
        """Step -> what was measured in it; of one that was done again, what the last said."""
        try:
            lines = (self.save / "metrics.jsonl").read_text().splitlines()
        except OSError:
            return {}
        found = [json.loads(line) for line in lines if line.endswith("}")]
        return {line["iteration"]: line for line in found if "train/loss" in line}

    def reached(self) -> int:
        return max(self.metrics(), default=0)

    def saved(self) -> int:
        """Of the newest checkpoint; 0: there is none."""
        try:
            return int((self.save / "latest_checkpointed_iteration.txt").read_text())
        except OSError:
            return 0

    def until(self, what: Callable[[], object], seconds: float = 90) -> None:
        deadline = time.monotonic() + seconds
        while not what():
            if time.monotonic() > deadline or self.cluster.state(self.number) in ENDED:
                raise ClusterError(f"job {self.number}, step {self.reached()}: it did not come to that\n{self.output}")
            time.sleep(0.05)

    def until_step(self, step: int, or_until: str | None = None) -> None:
        """or_until: or the script has printed that."""
        self.until(lambda: self.reached() >= step or (or_until and or_until in self.output))

    def numbers(self) -> tuple[list[int], list[float], list[str]]:
        """Steps, their losses and the hashes of their samples: what has to be equal, to the bit."""
        found = self.metrics()
        steps = sorted(found)
        return steps, [found[n]["train/loss"] for n in steps], [found[n]["train/samples_hash"] for n in steps]

    # Disturbances

    def freeze(self) -> None:
        """Stop all processes of the step, so that nothing happens until thaw()."""
        self._send(signal.SIGSTOP)

    def thaw(self) -> None:
        self._send(signal.SIGCONT)

    @contextlib.contextmanager
    def frozen_for_good(self) -> Iterator[None]:
        """SLURM sends SIGCONT before SIGTERM: they are stopped again and again, and only SIGKILL ends them."""
        self.freeze()
        over = threading.Event()

        def again() -> None:
            while not over.wait(0.05):
                self.freeze()

        thread = threading.Thread(target=again, daemon=True)
        thread.start()
        try:
            yield
        finally:
            over.set()
            thread.join()

    def _send(self, number: int) -> None:
        for pid in self.cluster.processes(self.number):
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, number)

    # What becomes of it

    def until_requeued(self, seconds: float = 90) -> int:
        """Until it waits to be started again. Returns the steps lost: done, and not in a checkpoint."""
        self._requeued += 1

        def waits(fields: dict[str, str]) -> bool:
            return fields.get("JobState") == "PENDING" and int(fields["Restarts"]) == self._requeued

        self.cluster.wait_for(self.number, waits, seconds, "is not requeued")
        return self.reached() - self.saved()

    @property
    def restarts(self) -> int:
        return int(self.cluster.show(self.number).get("Restarts", 0))

    def said(self) -> list[tuple[str, str]]:
        """(exit code, what became of it) as the script said at each end but the good one."""
        return re.findall(r"exit code (\d+),? .*?saved: (.*)", self.output)
