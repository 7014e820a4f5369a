"""The four lines at the start of a run, of stand-ins for what they are made of."""

from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest

from megatron_ft.adapters.spec import Lora
from megatron_ft.checkpoints.training_state import Progress
from megatron_ft.config.settings import TrainingSettings
from megatron_ft.engine.parallel import Layout
from megatron_ft.models.architecture import Architecture
from megatron_ft.models.trainable import ALL, Trainable
from megatron_ft.training.start_lines import Start

ARCH = Architecture(
    "llama", num_layers=2, hidden_size=64, ffn_hidden_size=128, num_attention_heads=4, num_query_groups=4, head_dim=16,
    vocab_size=100, max_position_embeddings=64, norm_epsilon=1e-5,
)  # fmt: skip


def samples(*lengths):
    """Stands in for a ChatDataset."""
    return SimpleNamespace(
        shards=[SimpleNamespace(lengths=np.array(lengths))], num_samples=len(lengths), seq_length=64,
        epoch_rows=lambda epoch: [0], fill=lambda: 0.5, epochs_of=lambda rows: rows / 4,
    )  # fmt: skip


def adapted(base):
    """Stands in for an Adapting."""
    return SimpleNamespace(lora=Lora(4, 8.0, ("q_proj",)), base=Path(base))


@pytest.fixture
def start():
    layout = Layout(1, 1, 1, 0, 0, 0, False, 0)
    return Start(
        TrainingSettings.of(train_iters=10, save="runs/x"), layout, Path("base/release"), SimpleNamespace(architecture=ARCH),
        ALL, None, samples(20, 12), None, 1, Progress(), Path("runs/x"),
    )  # fmt: skip


def test_four_lines(start):
    model, data, steps, output = start.lines()
    assert model == "model:  llama, 95.0 k parameters in fp32, from base/release"
    assert data == "data:   2 samples (32 tokens) in 1 row of 64, 50.0% of positions filled; none to validate on"
    assert steps == "steps:  10 steps of 1 row, 2.50 epochs in all; TP1 x PP1 x DP1: 1 process on CPU"
    assert output == "output: a checkpoint at the end in runs/x, with log and metrics"


@pytest.mark.parametrize(
    ("changes", "part"),
    [
        ({"valid_set": samples(9)}, "; 1 sample to validate on"),
        ({"train_set": samples(1)}, "1 sample (1 token) in 1 row"),
        ({"rows": 8}, "10 steps of 8 rows, 20.00 epochs"),
        ({"progress": Progress(9, 9)}, "in all; TP1 x PP1 x DP1: 1 process on CPU; resuming at iteration 9, 9 rows consumed"),
        ({"progress": Progress(9, 9)}, "1 step of 1 row, 2.50"),
        ({"progress": Progress(12, 1)}, "0 steps of 1 row,"),
        ({"trainable": Trainable(("layers.1.mlp",))}, "; 24,576 parameters are trained (25.86%)"),
        ({"adapting": adapted("base/release")}, "; LoRA of rank 4; 1,024 parameters are trained (1.08%)"),
        ({"adapting": adapted("other")}, "; LoRA of rank 4 of other; 1,024"),
        ({"folder": Path("logs")}, "at the end in runs/x; log and metrics in logs"),
        ({"settings": {"save": None}, "folder": None}, "output: no checkpoint: --save is not set"),
        ({"settings": {"save": None, "run_dir": "logs"}, "folder": Path("logs")}, "--save is not set; log and metrics in logs"),
        ({"settings": {"save_interval": 1}}, "a checkpoint every step and at the end in runs/x"),
        ({"settings": {"save_interval": 5}}, "a checkpoint every 5 steps and at the end"),
        ({"settings": {"bf16": True, "teacher": "big"}}, "95.0 k parameters in bf16, from base/release; teacher big"),
    ],
)  # fmt: skip
def test_what_else_they_say(start, changes, part):
    given = {"train_iters": 10, "save": "runs/x"} | changes.pop("settings", {})
    lines = list(replace(start, settings=TrainingSettings.of(**given), **changes).lines())
    assert len(lines) == 4 and any(part in line for line in lines), lines
