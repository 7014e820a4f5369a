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
from benchmarks.slurm_processes import children, environments
from tests.errors.conftest import EXTRA, ROOT, Desk, train_tokenizer, write_chats

SCRIPT = ROOT / "examples" / "oasst_llama2_70b" / "stage1.sbatch"
STEPS = 40
RANKS_A_NODE = 2
SAVES = 5
AT = 8
"""A step after which jobs are disturbed; no checkpoint is due then."""


@dataclass(frozen=True)
class Shop:
    """What jobs need: paths."""

    tokenizer: Path
    checkpoint: Path
    shards: str
    chats: Path


def make_shop(root: Path, hidden_size: int = 64) -> Shop:
    """root: a folder to make. hidden_size: heads are 16 wide, two share a key and value."""
    root.mkdir()
    tokenizer, chats = train_tokenizer(root / "t", 300), write_chats(root / "chats.jsonl", 200)
    engine, desk = Desk("engine"), Desk()
    try:
        sizes = ("--hidden_size", hidden_size, "--max_position_embeddings", 128)
        extra = ("--vocab_extra_ids_list", EXTRA, "--ckpt_format", "torch_dist")
        for done in (
            engine(tokenizer, root / "hf", *sizes, module="examples.oasst.make_tiny_llama"),
            engine("hf-to-megatron", root / "hf", root / "model", *extra),
            desk("pretokenize", "--input", chats, "--tokenizer", tokenizer, "--output_prefix", root / "d" / "c"),
        ):
            assert done.code == 0, done.err
    finally:
        engine.close()
        desk.close()
    return Shop(tokenizer, root / "model", f"{root}/d/c-train", chats)


class Job:
    """The 70B script as a job of this cluster, on a small model."""

    def __init__(self, cluster: Cluster, shop: Shop, folder: Path, *flags, **options):
        """flags: of finetune, after the script's own. options: of sbatch; env: variables besides those set here."""
        self.cluster, self.folder = cluster, folder
        self.save, self.logs = folder / "save", folder / "logs"
        environment = {
            "SAVE": str(self.save), "LOGS": str(self.logs), "PYTHON": sys.executable, "GPUS_PER_NODE": str(RANKS_A_NODE),
            "MEGATRON_FT_DEVICE": "cpu", "OMP_NUM_THREADS": "1", "WANDB_MODE": "offline",
        }  # fmt: skip
        words = [
            "--tensor_model_parallel_size", 2, "--pipeline_model_parallel_size", 2, "--load", shop.checkpoint,
            "--data_path", shop.shards, "--vocab_file", shop.tokenizer, "--max_position_embeddings", 128,
            "--seq_length", 128, "--global_batch_size", 4, "--micro_batch_size", 1, "--train_iters", STEPS,
            "--save_interval", SAVES, "--lr_warmup_iters", 2, "--lr", "1e-3", "--no_wandb_logger", *flags,
        ]  # fmt: skip
        environment |= options.pop("env", {})
        self._words, self._options = words, {"nodes": 2, "cwd": ROOT, "env": environment} | options
        self.submit()

    def submit(self) -> None:
        """Again: as another job of the same run."""
        self.number = self.cluster.submit(SCRIPT, *self._words, **self._options)
        self.requeued = 0
        """Times that it is known to have been requeued."""

    @property
    def nodes(self) -> list[str]:
        """Where it runs; rank 0 and the script on the first."""
        return self.cluster.run(
            "scontrol", "show", "hostnames", self.cluster.show(self.number)["NodeList"]
        ).stdout.split()

    @property
    def output(self) -> str:
        return self.cluster.output(self.number)

    def wait(self, seconds: float = 120) -> tuple[str, str]:
        """(state, exit code as scontrol has it)."""
        return self.cluster.wait(self.number, seconds)

    def measured(self) -> list[dict]:
        """Of each step, in the order in which they were done; of some more than once."""
        try:
            lines = (self.save / "metrics.jsonl").read_text().splitlines()
        except OSError:
            return []
        found = [json.loads(line) for line in lines if line.endswith("}")]
        return [line for line in found if "train/loss" in line]

    def metrics(self) -> dict[int, dict]:
        """Step -> what was measured in it; of one that was done again, what the last said."""
        return {line["iteration"]: line for line in self.measured()}

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

    def until_step(self, step: int, or_until: str | None = None, seconds: float = 90) -> None:
        """or_until: or the script has printed that."""
        self.until(lambda: self.reached() >= step or (or_until and or_until in self.output), seconds)

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
        self._kill(self.cluster.processes(self.number), number)

    def kill_rank(self, rank: int) -> None:
        """SIGKILL. A launcher's children are its ranks, in order."""
        node, local = divmod(rank, RANKS_A_NODE)
        launcher = min(self.cluster.processes(self.number, self.nodes[node]))
        self._kill([sorted(children(launcher))[local]], signal.SIGKILL)

    @staticmethod
    def _kill(pids: list[int], number: int) -> None:
        for pid in pids:
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, number)

    # What becomes of it

    def until_requeued(self, seconds: float = 90) -> int:
        """Until it waits to be started once more. Returns the steps lost: done, and not in a checkpoint."""
        self.requeued += 1

        def waits(fields: dict[str, str]) -> bool:
            return fields.get("JobState") == "PENDING" and int(fields["Restarts"]) == self.requeued

        self.cluster.wait_for(self.number, waits, seconds, "is not requeued")
        return self.reached() - self.saved()

    def is_left_alone(self) -> bool:
        """Whether none of its earlier starts has a process any more."""
        mine = {"SLURM_CONF": str(self.cluster.folder / "slurm.conf"), "SLURM_JOB_ID": self.number}
        found = [each for _, each in environments() if mine.items() <= each.items()]
        return {int(each.get("SLURM_RESTART_COUNT", 0)) for each in found} <= {self.restarts}

    @property
    def restarts(self) -> int:
        return int(self.cluster.show(self.number).get("Restarts", 0))

    def first_error(self) -> str:
        """The first line of any process that says error."""
        return next((line for line in self.output.splitlines() if "error:" in line), "")

    def said(self) -> list[tuple[str, str]]:
        """(exit code, what became of it) as the script said at each end but the good one."""
        return re.findall(r"exit code (\d+),? .*?saved: (.*)", self.output)


def make_room(cluster: Cluster) -> str:
    """A job with priority that wants all nodes; returns its number."""
    script = cluster.folder / "jobs" / "priority.sh"
    script.write_text("#!/bin/bash\nsleep 1\n")
    return cluster.submit(script, nodes=len(cluster.nodes), partition="high", exclusive=True)


def ends_as_undisturbed(job: Job, straight, restarts: int = 1, more: int = 0, seconds: float = 180) -> None:
    """straight: the numbers of a run that nobody disturbed. more: restarts that there may be, besides."""
    assert job.wait(seconds) == ("COMPLETED", "0:0"), job.output
    assert restarts <= job.restarts <= restarts + more, job.output
    assert job.numbers() == straight
