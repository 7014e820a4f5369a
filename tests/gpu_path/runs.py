"""What ranks do in a whole run: `finetune` to a checkpoint, again from there to the end, and decoding. Module-level, so that it travels."""

from __future__ import annotations

import json
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np

BF16, FP16 = {"bf16": True}, {"fp16": True, "initial_loss_scale": 256.0}
ASYNC, CLASSIC, DISTRIBUTED = {"async_save": True}, {"ckpt_format": "torch"}, {"use_distributed_optimizer": True}
DROPPING = {"hidden_dropout": 0.1, "recompute_granularity": "full"}
OVERLAP = {"overlap_grad_reduce": True, "overlap_param_gather": True}
VPP, P2P = {"num_layers_per_virtual_pipeline_stage": 1}, {"overlap_p2p_communication": True}


@dataclass(frozen=True)
class Run:
    """One run; settings by field name, whatever their section."""

    name: str
    processes: int
    layout: tuple[int, int]
    """(TP, PP)"""
    settings: dict = field(default_factory=dict)
    layers: int = 4
    thorough: bool = True


RUNS = {
    run.name: run
    for run in (
        Run("bf16", 1, (1, 1), BF16),
        Run("bf16-async-distributed", 1, (1, 1), BF16 | ASYNC | DISTRIBUTED, thorough=False),
        Run("fp16-async", 1, (1, 1), FP16 | ASYNC),
        Run("fp16-async-distributed-classic", 1, (1, 1), FP16 | ASYNC | DISTRIBUTED | CLASSIC),
        Run("bf16-classic-async-dropout", 1, (1, 1), BF16 | CLASSIC | ASYNC | DROPPING),
        Run("dp2-distributed-overlap", 2, (1, 1), BF16 | DISTRIBUTED | OVERLAP | ASYNC | {"check_replicas_every": 2}),
        Run("tp2-sp-dropout", 2, (2, 1), BF16 | DROPPING | DISTRIBUTED),
        Run("pp2-variable-lengths", 2, (1, 2), BF16 | {"packing": False, "variable_seq_lengths": True}),
        Run("pp2-vpp2", 2, (1, 2), BF16 | VPP),
        Run("pp2-vpp2-overlap-p2p", 2, (1, 2), BF16 | VPP | P2P | ASYNC),
        Run("pp4-vpp2", 4, (1, 4), BF16 | VPP, layers=8),
        Run("pp4-vpp2-overlap-p2p", 4, (1, 4), BF16 | VPP | P2P, layers=8),
    )
}


@dataclass
class Told:
    """What a rank has to say of a whole run."""

    exits: tuple[int, int]
    lines: list[dict]
    """of metrics.jsonl"""

    def values(self, name: str) -> list[float]:
        return [line[name] for line in self.lines if name in line]


def train_save_resume(run: Run, checkpoint: str, shards: str, folder: str) -> Told:
    """Train 4 of 6 steps, saving and evaluating every 2; resume and end."""
    import torch.distributed as dist

    from tests.parallel.jobs import finetune

    common = run.settings | {
        "data_path": [shards], "save": folder, "save_interval": 2, "eval_interval": 2, "eval_iters": 1, "log_interval": 1,
    }  # fmt: skip
    first = finetune(run.layout, load=checkpoint, train_iters=4, exit_interval=4, **common)
    second = finetune(run.layout, load=folder, train_iters=6, **common)
    dist.barrier()
    text = (Path(folder) / "metrics.jsonl").read_text()
    return Told((first, second), [json.loads(line) for line in text.splitlines()])


def decode(checkpoint: str, layout: tuple[int, int]) -> list:
    """Return what is decoded greedily and by sampling after three prompts, in fp32."""
    from megatron_ft.generation.sampling import Sampling
    from tests.parallel.jobs import generate

    prompts = [np.arange(5, 5 + length) for length in (3, 9, 5)]
    return [
        generate(checkpoint, layout, prompts, max_new_tokens=12),
        generate(checkpoint, layout, prompts, max_new_tokens=12, sampling=Sampling(0.7, 20, 0.9), seed=5),
    ]
