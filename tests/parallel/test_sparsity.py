"""Zeros in the MLPs while training: those of transformers, the same in every layout, and a run that is the same to the bit without them."""

import json
import re
from functools import partial

import numpy as np
import pytest
import torch

from megatron_ft.data.shards import ShardWriter
from tests.conversion.builders import FAMILIES, make_family
from tests.evaluation.test_sparsity import inputs_of_down
from tests.parallel.jobs import finetune, read_metrics, to_checkpoint

SIZES = (4, 60, 24, 40, 33, 64, 11, 20)
"""Positions of the samples: eight rows with padding, or four rows without."""
LAYOUTS = {
    "one process, packed": ((1, 1), {}),
    "full recompute": ((1, 1), {"packing": False, "recompute_granularity": "full"}),
    "TP2xPP2+SP": ((2, 2), {"packing": False}),
    "TP2xPP2+SP, packed, MLP recomputed": ((2, 2), {"recompute_granularity": "selective", "recompute_modules": ["mlp"]}),
    "PP2xDP2, rows of different lengths": (
        (1, 2), {"sequence_parallel": False, "packing": False, "variable_seq_lengths": True},
    ),
    "TP2xVPP": ((2, 2), {"virtual_pipeline_model_parallel_size": 2}),
    "LoRA": ((2, 2), {"lora_rank": 2}),
}  # fmt: skip


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    """A Falcon with ReLU, a Llama without, and eight samples: one global batch."""
    place = tmp_path_factory.mktemp("sparsity")
    FAMILIES["falcon, relu"] = ("falcon", {**FAMILIES["falcon 40b"][1], "activation": "relu"})
    for name in ("falcon, relu", "llama"):
        make_family(place / f"{name}-hf", name)
        to_checkpoint(place / f"{name}-hf", place / name, "torch_dist", 1, 1)
    del FAMILIES["falcon, relu"]
    rng = np.random.default_rng(3)
    with ShardWriter(place / "chats-train", 203) as writer:
        for size in SIZES:
            writer.add(rng.integers(0, 203, size + 1), np.full(size + 1, 2, np.uint8))
    return place


def train(pool, place, save, layout=(1, 1), name="falcon, relu", **flags):
    settings = {
        "load": str(place / name), "data_path": [str(place / "chats-train")], "valid_data_path": [str(place / "chats-train")],
        "save": str(save), "train_iters": 2, "lr_warmup_iters": 0, "micro_batch_size": 1, "log_interval": 1, "report": False,
        "global_batch_size": 4 if flags.get("packing", True) else 8, **flags,
    }  # fmt: skip
    pool.run(partial(finetune, layout, **settings))


def logged(folder) -> list[dict[str, float]]:
    """The shares of the first step and of the last evaluation, by name."""
    entries = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    return [
        {name.split("/", 1)[1]: value for name, value in entry.items() if name.startswith(f"{where}/sparsity")}
        for where, entry in (("train", entries[0]), ("eval", next(e for e in reversed(entries) if "eval/loss" in e)))
    ]


def expected(place) -> dict[str, float]:
    """Those of transformers over the samples, each without its last token."""
    from transformers import AutoModelForCausalLM

    from megatron_ft.data.shards import open_shards

    model = AutoModelForCausalLM.from_pretrained(place / "falcon, relu-hf").eval()
    shards = open_shards(str(place / "chats-train"))
    zeros = sum(
        torch.stack(
            [(x == 0).sum() for x in inputs_of_down(model, torch.from_numpy(shards.tokens(n)[:-1].astype(np.int64)))]
        )
        for n in range(len(shards))
    )
    shares = (zeros / (sum(SIZES) * 4 * 64)).tolist()
    return {f"sparsity_by_layer/{n}": share for n, share in enumerate(shares)} | {"sparsity": float(np.mean(shares))}


@pytest.mark.parametrize("name", LAYOUTS)
@pytest.mark.works("ReLU", "Falcon", "SP", "PP", ["padded rows", "packing", "recompute", "LoRA"])
@pytest.mark.works("ReLU", "Falcon", "SP", "VPP")
@pytest.mark.works("ReLU", "Falcon", "PP", "DP", "rows of variable length")
def test_those_of_transformers_in_every_layout(name, place, one_rank, four_ranks, tmp_path):
    """Padding does not count, nor does a recomputed pass."""
    layout, flags = LAYOUTS[name]
    train(one_rank if layout == (1, 1) else four_ranks, place, tmp_path, layout, **flags)
    wanted, (first, evaluated) = expected(place), logged(tmp_path)
    assert first == pytest.approx(wanted, abs=1e-4) and len(first) == 5
    assert 0.2 < first["sparsity"] < 0.8
    assert evaluated.keys() == first.keys() and evaluated != first  # the weights have changed
    assert evaluated == pytest.approx(first, abs=0.1)


def test_nothing_else_changes(place, one_rank, tmp_path):
    """Loss, gradients and weights to the bit; on by default for ReLU alone; in the log and in the report."""
    from megatron_ft.checkpoints.folder import find_checkpoint
    from megatron_ft.checkpoints.verify import tensor_hashes

    states = []
    for flag in (None, False):
        train(one_rank, place, tmp_path / str(flag), log_sparsity=flag, report=True)
        folder = tmp_path / str(flag)
        states.append(
            (read_metrics(folder), read_metrics(folder, "train/grad_norm"), tensor_hashes(find_checkpoint(folder)))
        )
    assert states[0] == states[1]
    shown, hidden = ((tmp_path / str(flag) / "report.html").read_text() for flag in (None, False))
    assert "Zeros in the MLPs" in shown and "exact zeros in the MLPs (share)" in shown and "zeros" not in hidden.lower()
    share = logged(tmp_path / "None")[0]["sparsity"]
    assert f"falcon, relu, 0: {100 * share:.1f}" not in hidden and not any(logged(tmp_path / "False"))
    assert re.search(r"step 1, 3: \d\d\.\d%", shown)
    train(one_rank, place, tmp_path / "silu", name="llama")
    assert not any(logged(tmp_path / "silu"))
    train(one_rank, place, tmp_path / "asked", name="llama", log_sparsity=True)
    assert logged(tmp_path / "asked")[0]["sparsity"] == pytest.approx(0, abs=1e-3)


def test_the_line_of_progress():
    import io

    from megatron_ft.training.console import Console

    out = io.StringIO()
    console = Console(2, 2, out)
    step = {
        "train/loss": 1.0, "train/skipped": 0, "train/seconds": 1.0, "train/tokens": 10, "train/supervised_tokens": 5,
        "train/lr": 1e-3, "train/consumed_samples": 8, "train/global_batch_size": 8, "train/grad_norm": 1.0,
    }  # fmt: skip
    for iteration, share in ((1, 0.5), (2, 0.6)):
        console.on_step(iteration, step | {"train/sparsity": share})
    assert "| MLP zeros: 55.00% | eta:" in out.getvalue()


def test_a_teacher_is_not_counted(place, four_ranks, tmp_path):
    """Its layers run in the same passes."""
    train(four_ranks, place, tmp_path, (2, 2), packing=False, teacher=str(place / "llama"))
    assert logged(tmp_path)[0] == pytest.approx(expected(place), abs=1e-4)
