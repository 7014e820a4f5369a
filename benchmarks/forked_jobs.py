"""Whole jobs of `megatron-ft finetune` on a tiny model, forked from one process that has the imports done: started in a fraction of a
second, they can be killed and asked to stop thousands of times.

What campaigns on jobs share. A job tells through shared memory what it is doing and how many steps it has done.
"""

# ruff: noqa: E402
from __future__ import annotations

import contextlib
import ctypes
import logging
import mmap
import os
import signal
import sys
import time
import warnings
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.setdefault("MEGATRON_FT_DEVICE", "cpu")

import numpy as np
import torch

from megatron_ft.engine.start import prepare_engine

prepare_engine()  # before anything imports the engine, hence the imports below it

from megatron_ft.checkpoints.folder import describe
from megatron_ft.checkpoints.select import candidates
from megatron_ft.checkpoints.training_state import Progress
from megatron_ft.checkpoints.verify import read_description
from megatron_ft.commands import finetune as finetune_command
from megatron_ft.commands import report  # noqa: F401 - the forked jobs have it then
from megatron_ft.config.settings import TrainingSettings
from megatron_ft.data.roles import ASSISTANT, PROMPTER
from megatron_ft.data.shards import ShardWriter
from megatron_ft.digests import check_digests
from megatron_ft.engine import optimizer  # noqa: F401
from megatron_ft.errors import UserError
from megatron_ft.training import loop

VOCABULARY = 97
PHASES = ("starting", "loading", "stepping", "evaluating", "saving", "leaving")


def prepare(folder: Path) -> None:
    """A two-layer model and 200 chats in `folder`: checkpoint/ and chats-train, chats-val."""
    from transformers import LlamaConfig, LlamaForCausalLM

    from checkpoints_conversion.hf_to_megatron import HfToMegatron, convert

    torch.manual_seed(0)
    sizes = LlamaConfig(
        hidden_size=32, intermediate_size=64, num_hidden_layers=2, num_attention_heads=4, num_key_value_heads=2,
        vocab_size=VOCABULARY, max_position_embeddings=64,
    )  # fmt: skip
    LlamaForCausalLM(sizes).save_pretrained(folder / "hf")
    convert(HfToMegatron(input_dir=str(folder / "hf"), output_dir=str(folder / "checkpoint"), ckpt_format="torch_dist"))
    rng = np.random.default_rng(0)
    for split, count in (("train", 200), ("val", 8)):
        with ShardWriter(folder / f"chats-{split}", VOCABULARY) as writer:
            for _ in range(count):
                size = int(rng.integers(4, 40))
                roles = np.where(rng.random(size) < 0.5, ASSISTANT, PROMPTER).astype(np.uint8)
                writer.add(rng.integers(0, VOCABULARY, size), roles)


class Job:
    """A forked job of `ranks` processes. settings: of finetune's sections, by field name."""

    def __init__(self, folder: Path, ranks: int, tp: int, pp: int, **settings):
        self._shared = mmap.mmap(-1, 16 * ranks)
        store = folder / f"store-{time.monotonic_ns()}"
        self.pids = []
        for rank in range(ranks):
            pid = os.fork()
            if not pid:
                self._run(
                    rank,
                    ranks,
                    store,
                    {"tensor_model_parallel_size": tp, "pipeline_model_parallel_size": pp} | settings,
                )
            self.pids.append(pid)
        self._store = store

    @property
    def phase(self) -> str:
        """Of the first rank."""
        return PHASES[self._shared[0]]

    @property
    def steps(self) -> int:
        """Iterations that are done, the number where the run began included."""
        return int.from_bytes(self._shared[8:16], "little")

    def send(self, number: int, rank: int | None = None) -> None:
        """A signal to one rank, or to all."""
        for pid in self.pids if rank is None else [self.pids[rank]]:
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, number)

    def running(self) -> bool:
        """Whether the first rank is."""
        return os.waitid(os.P_PID, self.pids[0], os.WEXITED | os.WNOHANG | os.WNOWAIT) is None

    def wait(self) -> list[int]:
        """Exit codes by rank; negative: the signal."""
        codes = [os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) for pid in self.pids]
        self._store.unlink(missing_ok=True)
        return codes

    def _run(self, rank: int, ranks: int, store: Path, settings: dict) -> None:
        ctypes.CDLL(None).prctl(1, signal.SIGKILL)  # PR_SET_PDEATHSIG: never outlive the campaign
        code = 1
        try:
            os.environ.update(RANK=str(rank), WORLD_SIZE=str(ranks), LOCAL_RANK=str(rank))
            with open(os.devnull, "w") as nowhere:
                os.dup2(nowhere.fileno(), 1)
            warnings.simplefilter("ignore")
            logging.getLogger("megatron_ft").setLevel(logging.CRITICAL)
            torch.set_num_threads(1)
            torch.distributed.init_process_group(
                "gloo", store=torch.distributed.FileStore(str(store), ranks), rank=rank, world_size=ranks
            )
            self._tell(memoryview(self._shared)[16 * rank : 16 * rank + 16])
            code = finetune_command.run(_training(settings))
        except UserError as error:
            print(f"  rank {rank}: {error}", file=sys.stderr)
            code = error.exit_code
        except BaseException as error:
            print(f"  rank {rank}: {type(error).__name__}: {str(error)[:160]}", file=sys.stderr)
        finally:
            os._exit(code)

    def _tell(self, shared: memoryview) -> None:
        """Let the functions of the loop say when they run."""
        for name, phase in {"_timed_step": 2, "_evaluate": 3, "_save": 4}.items():
            setattr(loop, name, _telling(getattr(loop, name), shared, phase))
        shared[0] = 1


def _telling(function, shared: memoryview, phase: int):
    def call(*given, **more):
        progress = next(value for value in given if isinstance(value, Progress))
        shared[0] = phase
        if phase != 2:
            shared[8:16] = progress.iteration.to_bytes(8, "little")
        found = function(*given, **more)
        if phase == 2:
            shared[8:16] = (progress.iteration + 1).to_bytes(8, "little")
        shared[0] = 5 if phase == 4 else 2
        return found

    return call


def _training(settings: dict) -> TrainingSettings:
    values = {
        "seq_length": 64, "micro_batch_size": 1, "global_batch_size": 4, "lr": 1e-3, "log_interval": 10**6, "report": False,
        "hidden_dropout": 0.1, "attention_dropout": 0.1, "eval_iters": 1,
    } | settings  # fmt: skip
    return TrainingSettings.of(**values)


def newest(root: Path) -> tuple[int, int]:
    """(iteration, how many were passed over) of the newest checkpoint whose files are what was written; -1: none of them is, 0: nothing
    was saved yet.
    """
    if not any(root.glob("iter_*")):
        return 0, 0
    for passed, folder in enumerate(candidates(root)):
        try:
            check_digests(folder)
            read_description(folder)
            return int(describe(folder).iteration), passed
        except UserError as error:
            print(f"  {error}", file=sys.stderr)
    return -1, 0
