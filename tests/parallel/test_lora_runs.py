"""Runs that train adapters: what their checkpoints hold, stops, other layouts, the base they belong to."""

import json
from pathlib import Path

import numpy as np
import pytest

from tests.parallel.jobs import finetune, make_llama, read_metrics, to_checkpoint

LORA = {"lora_rank": 4, "lora_alpha": 8.0, "lora_dropout": 0.1}


def train(load, shards, save, until, layout=(2, 2), **flags):
    finetune(
        layout, load=load, data_path=[shards], save=save, report=False, train_iters=until, lr_decay_iters=10, hidden_dropout=0.1,
        **{"lr": 1e-2, **flags},
    )  # fmt: skip


def refused(*args, **flags):
    """The user's error of a run, as one line."""
    from megatron_ft.errors import UserError

    try:
        train(*args, **flags)
    except UserError as error:
        return str(error)
    return None


def hashes(root) -> dict[str, str]:
    from megatron_ft.checkpoints.folder import find_checkpoint
    from megatron_ft.checkpoints.verify import tensor_hashes

    return tensor_hashes(find_checkpoint(Path(root)))


def weights(root) -> dict[str, str]:
    return {
        name: value for name, value in hashes(root).items() if name.startswith("model.") and "extra_state" not in name
    }


def base_before_and_after(load, shards, layout, flags) -> tuple[dict, dict]:
    """Hashes of the model's own weights in memory, before the first step and after the last."""
    from unittest import mock

    from megatron_ft.adapters.base import weight_hashes
    from megatron_ft.checkpoints.folder import describe, find_checkpoint
    from megatron_ft.training.setup import bare
    from megatron_ft.training.step import Stepper

    arch, step, found = describe(find_checkpoint(Path(load))).architecture, Stepper.train, []

    def measured(stepper, *args, **options):
        if not found:
            found.append(weight_hashes(bare(stepper.model), arch))
        result = step(stepper, *args, **options)
        found[1:] = [weight_hashes(bare(stepper.model), arch)]
        return result

    with mock.patch.object(Stepper, "train", measured):
        train(load, shards, None, 3, layout, **flags)
    return found[0], found[1]


@pytest.mark.parametrize("flags", [{}, {"bf16": True, "base_precision": "nf4"}], ids=["LoRA", "QLoRA"])
def test_the_base_in_memory_stays_as_it_is(flags, four_ranks, wide_checkpoint, shards):
    for before, after in four_ranks.run(base_before_and_after, wide_checkpoint, shards, (2, 2), LORA | flags):
        assert before and before == after


@pytest.fixture(scope="module")
def wide_checkpoint(tmp_path_factory):
    """With rows of whole blocks of NF4, also in TP2."""
    folder = tmp_path_factory.mktemp("wide")
    hf = make_llama(folder / "hf", hidden_size=128, intermediate_size=256, head_dim=32)
    return to_checkpoint(hf, folder / "checkpoint", "torch_dist", 1, 1)


@pytest.mark.parametrize(
    ("flags", "steps"),
    [
        pytest.param({}, 10, marks=pytest.mark.thorough), ({"bf16": True, "use_distributed_optimizer": True}, 10),
        ({"fp16": True, "recompute_granularity": "full", "initial_loss_scale": 1024.0}, 4),
    ],
    ids=["fp32", "bf16, distributed", "fp16, recomputed"],
)  # fmt: skip
@pytest.mark.works("LoRA", "resume", "SP", "PP", "bf16", "distributed optimizer")
@pytest.mark.works("LoRA", "resume", "SP", "PP", "fp16", "recompute")
def test_a_run_that_is_stopped_and_resumed(flags, steps, four_ranks, checkpoint, shards, tmp_path):
    """A stop changes no bit. A checkpoint has the adapters and their optimizer state, and nothing of the base, which stays as it is."""
    before = hashes(checkpoint)
    for name, until in (("straight", (steps,)), ("resumed", (steps // 2, steps))):
        for stop in until:
            go(four_ranks, checkpoint, shards, tmp_path / name, stop, **LORA, **flags, auto_resume=True)
    assert read_metrics(tmp_path / "straight") == read_metrics(tmp_path / "resumed")
    one, other = hashes(tmp_path / "straight"), hashes(tmp_path / "resumed")
    assert one == other and hashes(checkpoint) == before
    assert not [name for name in one if "_lora." not in name and "rng" not in name]
    assert len(weights(tmp_path / "straight")) >= 2 * 7 * 4
    losses = read_metrics(tmp_path / "straight")
    assert len(losses) == steps and losses[0] != losses[-1]


def go(ranks, load, shards, save, until, layout=(2, 2), **flags):
    """A run that has to succeed."""
    assert ranks.run(run_with, load, shards, str(save), until, layout, flags) == [None] * ranks.size


def run_with(load, shards, save, until, layout, flags):
    return refused(load, shards, save, until, layout, **flags)


@pytest.fixture(scope="module")
def stays(four_ranks, checkpoint, shards, tmp_path_factory):
    """A run of four steps in TP2 x PP2, resumed after two; both checkpoints are there."""
    save = tmp_path_factory.mktemp("stays") / "first"
    go(four_ranks, checkpoint, shards, save, 2, **LORA)
    saved = hashes(save)
    go(four_ranks, checkpoint, shards, save, 4, **LORA, auto_resume=True, keep_last=2)
    assert hashes(save / "iter_0000002") == saved
    return save


@pytest.mark.parametrize(
    ("layout", "processes"),
    [((4, 1), 4), ((1, 2), 4), ((1, 1), 4), ((1, 1), 1)],
    ids=["TP4", "PP2 x DP2", "one stage, DP4", "one process"],
)
@pytest.mark.works("LoRA", "resume in another layout", ["TP", "PP", "DP"])
def test_adapters_go_on_in_another_layout(layout, processes, stays, four_ranks, one_rank, shards, tmp_path):
    """TP2 x PP2 -> others; the losses are those of the run that stays, and the adapters are loaded to the bit."""
    load = f"{stays}/iter_0000002"
    more = {"virtual_pipeline_model_parallel_size": 2} if layout == (1, 2) else {}
    ranks = four_ranks if processes == 4 else one_rank
    go(ranks, load, shards, tmp_path / "second", 4, layout, **more)
    stayed, moved = read_metrics(stays), read_metrics(tmp_path / "second")
    assert np.allclose(stayed[-2:], moved, rtol=2e-5, atol=0)
    kept = str(tmp_path / "kept")
    go(ranks, load, shards, kept, 1, layout, **more, finetune=True, lr=1e-30)
    before, after = whole(load), whole(kept)
    assert before.keys() == after.keys() and len(after) == 2 * 7 * 4
    assert all(np.array_equal(before[name], after[name]) for name in before)
    assert all(abs(before[name]).max() > 0 for name in before)


def whole(root) -> dict:
    """Every adapter's parameter as one matrix."""
    from megatron_ft.adapters.stored import read_checkpoint
    from megatron_ft.checkpoints.folder import describe, find_checkpoint

    folder = find_checkpoint(Path(root))
    return {name: matrix.numpy() for name, matrix in read_checkpoint(folder, describe(folder))[1].items()}


@pytest.mark.refuses("LoRA", "classic checkpoints", says="--ckpt_format torch cannot hold adapters alone")
@pytest.mark.refuses(
    "LoRA", "chosen parameters", says="--unfrozen_parameters and adapters (--lora_rank) both say what is trained"
)
def test_adapters_of_another_model_are_refused(one_rank, checkpoint, shards, tmp_path):
    """By the hash of its weights, whatever its format and layout; the same weights in another format are accepted."""
    hf = make_llama(tmp_path / "hf")
    classic = to_checkpoint(hf, tmp_path / "classic", "torch", 1, 1)
    other = to_checkpoint(changed(hf, tmp_path / "changed"), tmp_path / "other", "torch_dist", 1, 1)
    small = to_checkpoint(make_llama(tmp_path / "hf4", num_hidden_layers=2), tmp_path / "small", "torch_dist", 1, 1)
    save, plain = tmp_path / "first", tmp_path / "plain"
    go(one_rank, checkpoint, shards, save, 1, (1, 1), **LORA)
    go(one_rank, checkpoint, shards, plain, 1, (1, 1))
    go(one_rank, str(save), shards, save, 2, (1, 1), base=classic)
    entry = json.loads((save / "iter_0000002" / "config.json").read_text())["adapter"]
    assert entry["base"]["path"].startswith(classic) and entry["rank"] == 4

    def said(load, **flags):
        (error,) = one_rank.run(run_with, str(load), shards, str(tmp_path / "no"), 3, (1, 1), flags)
        return error

    assert "is not the model that the adapters were trained with" in said(save, base=other)
    assert "is another model than the one" in said(save, base=small)
    assert "holds adapters, not the model" in said(save, base=str(save))
    assert "cannot be read" in said(save, base=str(tmp_path / "nowhere"))
    assert "trained the model itself" in said(plain, **LORA)
    assert "drop --base" in said(checkpoint, **LORA, base=checkpoint)
    assert "continues from have 4" in said(save, lora_rank=8)
    assert "continues from have q_proj" in said(save, lora_target=["qkv"])
    assert "--lora_rank 0: must be at least 1" in said(checkpoint, lora_rank=0)
    assert "the model has no such part; use all, or some of qkv" in said(checkpoint, lora_rank=4, lora_target=["query"])
    assert "add --lora_rank, or drop --lora_alpha" in said(checkpoint, lora_alpha=4.0)
    assert "--lora_alpha 0.0: must be above 0" in said(checkpoint, lora_rank=4, lora_alpha=0.0)
    assert "--lora_dropout 1.0: must be" in said(checkpoint, lora_rank=4, lora_dropout=1.0)
    assert "both say what is trained" in said(checkpoint, lora_rank=4, unfrozen_parameters=["mlp"])
    assert "cannot hold adapters alone" in said(checkpoint, lora_rank=4, ckpt_format="torch")
    assert not (tmp_path / "no").exists()


def changed(hf: Path, folder: Path) -> Path:
    """The same model with one number changed by one bit."""
    import shutil

    import torch
    from safetensors.torch import load_file, save_file

    shutil.copytree(hf, folder)
    tensors = load_file(folder / "model.safetensors")
    tensors["model.layers.3.mlp.up_proj.weight"].view(-1).view(torch.int32)[77] ^= 1
    save_file(tensors, folder / "model.safetensors", {"format": "pt"})
    return folder
