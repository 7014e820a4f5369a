"""An evaluation is over every row of the validation set once, however few there are beside a global batch."""

import json

import numpy as np
import pytest

from megatron_ft.data.roles import ASSISTANT, PROMPTER
from megatron_ft.data.shards import ShardWriter, open_shards
from tests.parallel.jobs import VOCAB, finetune


@pytest.fixture(scope="module")
def few(tmp_path_factory):
    """Prefix of eleven conversations: not a multiple of a global batch of 8, and fewer rows than that when packed."""
    prefix = tmp_path_factory.mktemp("few") / "few"
    rng = np.random.default_rng(3)
    with ShardWriter(prefix, VOCAB) as writer:
        for _ in range(11):
            count = int(rng.integers(8, 40))
            writer.add(
                rng.integers(0, VOCAB, count), np.where(rng.random(count) < 0.5, ASSISTANT, PROMPTER).astype(np.uint8)
            )
    return str(prefix)


@pytest.mark.parametrize("packing", [True, False], ids=["packed", "one a row"])
def test_every_row_once_in_every_layout(packing, few, one_rank, four_ranks, checkpoint, shards, tmp_path):
    found = {}
    for name, pool, layout in (("one", one_rank, (1, 1)), ("DP4", four_ranks, (1, 1)), ("TP2xPP2", four_ranks, (2, 2))):
        pool.run(evaluate, layout, checkpoint, shards, few, str(tmp_path / name), packing)
        lines = (tmp_path / name / "metrics.jsonl").read_text().splitlines()
        found[name] = next(entry for entry in map(json.loads, lines) if "eval/loss" in entry)
    opened = open_shards(few)
    assert {entry["eval/tokens"] for entry in found.values()} == {int(opened.lengths.sum()) - len(opened)}
    losses = [entry["eval/loss"] for entry in found.values()]
    np.testing.assert_allclose(losses, losses[0], rtol=1e-5)


def evaluate(layout, load, shards, few, folder, packing):
    finetune(
        layout, load=load, data_path=[shards], valid_data_path=[few], run_dir=folder, train_iters=1, lr_warmup_iters=0,
        lr=1e-9, packing=packing, variable_seq_lengths=not packing,
    )  # fmt: skip
