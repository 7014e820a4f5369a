"""A run of ours against a loop written with transformers and torch alone: losses, gradient norms, and the weights at the end.

The loop knows the shards' tokens and roles, and which samples a step takes. Masking, the mean over the global batch, clipping,
schedule, weight decay and AdamW are its own.
"""

import math

import numpy as np
import pytest
import torch

from megatron_ft.data.loader import ChatDataset, Choices
from megatron_ft.data.roles import ASSISTANT, loss_weights
from megatron_ft.data.shards import open_shards
from tests.parallel.jobs import SEQ_LENGTH, finetune, read_metrics, to_hf

STEPS, BATCH, LR, WARMUP, DECAY, CLIP = 10, 8, 2e-3, 3, 0.1, 1.0


@pytest.fixture(scope="module")
def theirs(llama, shards):
    """(losses, gradient norms, weights at the end) of the loop with transformers."""
    from transformers import LlamaForCausalLM

    model = LlamaForCausalLM.from_pretrained(llama, dtype=torch.float32)
    matrices = [p for p in model.parameters() if p.ndim > 1]
    others = [p for p in model.parameters() if p.ndim == 1]
    groups = [{"params": matrices, "weight_decay": DECAY}, {"params": others, "weight_decay": 0.0}]
    optimizer = torch.optim.AdamW(groups, betas=(0.9, 0.95), eps=1e-8)
    opened, losses, norms = open_shards(shards), [], []
    for step in range(STEPS):
        for group in optimizer.param_groups:
            group["lr"] = rate(step)
        total, weight = 0.0, 0
        for sample in samples_of(shards, step):
            tokens, roles = opened.tokens(sample)[: SEQ_LENGTH + 1], opened.roles(sample)[: SEQ_LENGTH + 1]
            ids = torch.from_numpy(tokens.astype(np.int64))[None]
            logits = model(input_ids=ids[:, :-1]).logits[0]
            own = torch.nn.functional.cross_entropy(logits, ids[0, 1:], reduction="none")
            mask = torch.from_numpy((roles[1:] == ASSISTANT).astype(np.float32))
            total, weight = total + (own * mask).sum(), weight + int(mask.sum())
        loss = total / weight
        optimizer.zero_grad()
        loss.backward()
        norms.append(float(torch.nn.utils.clip_grad_norm_(model.parameters(), CLIP)))
        losses.append(float(loss))
        optimizer.step()
    return losses, norms, {name: value.detach() for name, value in model.state_dict().items()}


def rate(step: int) -> float:
    """Linear from 0, then a cosine to 0, as Megatron does it: by the number of steps done."""
    if step <= WARMUP:
        return LR * step / WARMUP
    return LR / 2 * (1 + math.cos(math.pi * (step - WARMUP) / (STEPS - WARMUP)))


def samples_of(shards: str, step: int) -> list[int]:
    """The samples of a step's global batch, one a row."""
    dataset = ChatDataset([open_shards(shards)], loss_weights(), Choices(SEQ_LENGTH, seed=1234, packed=False))
    return [int(sample) for row in range(step * BATCH, (step + 1) * BATCH) for sample in dataset.samples_of(row)]


@pytest.mark.parametrize("layout", [(1, 1), (2, 2)], ids=["one process", "TP2xPP2"])
def test_trains_as_transformers_does(layout, theirs, one_rank, four_ranks, checkpoint, shards, tmp_path):
    pool = four_ranks if layout == (2, 2) else one_rank
    pool.run(train, layout, checkpoint, shards, str(tmp_path / "tuned"))
    losses, norms, weights = theirs
    np.testing.assert_allclose(read_metrics(tmp_path / "tuned"), losses, rtol=1e-5)
    np.testing.assert_allclose(read_metrics(tmp_path / "tuned", "train/grad_norm"), norms, rtol=1e-4)
    assert len({round(loss, 2) for loss in losses}) > 3 and max(norms) > CLIP  # something was learned, and clipped
    ours = to_hf(str(tmp_path / "tuned"), tmp_path / "hf")
    assert set(ours) == set(weights)
    for name, value in weights.items():
        torch.testing.assert_close(ours[name], value, rtol=1e-3, atol=2e-5, msg=name)


def train(layout, load, shards, save):
    finetune(
        layout, load=load, data_path=[shards], save=save, packing=False, train_iters=STEPS, lr=LR, lr_warmup_iters=WARMUP,
        weight_decay=DECAY, adam_beta2=0.95, clip_grad=CLIP, use_distributed_optimizer=layout == (2, 2),
    )  # fmt: skip
