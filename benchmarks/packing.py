"""Claim: packing trains on the same supervised tokens in a fraction of the time that one padded sample a row takes.

One process, one CPU thread, one run: the whole set once, padded to seq_length as the original did, padded to the longest sample of each
microbatch (--variable_seq_lengths), and packed; same model, same samples, same supervised tokens. Prints seconds, the share of
positions that hold a token, and the ratios.

    python benchmarks/packing.py SHARDS_PREFIX [--seq_length 2048] [--samples 64] [--hidden 128]
"""

import argparse
import os
import time

os.environ.setdefault("OMP_NUM_THREADS", "1")

import numpy as np
import torch

from megatron_ft.config.sections import Batch, Data, Numerics, Optimizer, Parallelism
from megatron_ft.data.loader import ChatDataset, Choices
from megatron_ft.data.roles import loss_weights
from megatron_ft.data.shards import open_shards
from megatron_ft.engine.parallel import process_groups
from megatron_ft.models.architecture import Architecture

WAYS = {
    "padded to seq_length": {"packed": False},
    "padded to the longest": {"packed": False, "variable": True},
    "packed": {"packed": True},
}


class Some:
    """The first samples of some shards."""

    def __init__(self, shards, count: int):
        self.shards, self.prefix, self.manifest = shards, shards.prefix, shards.manifest
        self.lengths = shards.lengths[:count]
        self.tokens, self.role_bytes, self.loss_weights = shards.tokens, shards.role_bytes, shards.loss_weights
        self.manifest.sources.clear()

    def __len__(self):
        return len(self.lengths)


def architecture(vocab: int, hidden: int, positions: int) -> Architecture:
    return Architecture(
        family="llama", num_layers=4, hidden_size=hidden, ffn_hidden_size=hidden * 11 // 4, num_attention_heads=8,
        num_query_groups=4, head_dim=hidden // 8, vocab_size=vocab, max_position_embeddings=positions, norm_epsilon=1e-5,
    )  # fmt: skip


def train_once(dataset: ChatDataset, arch: Architecture, layout, variable: bool) -> dict:
    """One epoch with a fresh model; seconds, tokens and positions."""
    from megatron_ft.engine.optimizer import make_optimizer, make_schedule
    from megatron_ft.training import setup
    from megatron_ft.training.step import Stepper

    data = Data(seq_length=dataset.seq_length, packing=dataset.packed, variable_seq_lengths=variable)
    model = setup.make_model(arch, layout, data, Parallelism(), Numerics())
    torch.manual_seed(0)
    for weight in model.parameters():
        torch.nn.init.normal_(weight, std=0.02) if weight.ndim > 1 else None
    section = Optimizer(lr=1e-4, lr_decay_style="constant")
    optimizer = make_optimizer(model, section, Numerics(), distributed=False)
    make_schedule(optimizer, section, Batch(train_iters=10**6)).step(increment=1)
    stepper = Stepper(model, layout, 1, 1)
    rows = len(dataset.epoch_rows(0))
    start, seen = time.perf_counter(), {"tokens": 0, "supervised": 0, "positions": 0}
    for row in range(rows):
        result = stepper.train(dataset, row, optimizer)
        seen["tokens"] += result.tokens
        seen["supervised"] += result.supervised_tokens
        seen["positions"] += dataset.microbatch([row]).tokens.size
    return seen | {"seconds": time.perf_counter() - start, "rows": rows}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("shards")
    for name, default in (("seq_length", 2048), ("samples", 64), ("hidden", 128)):
        parser.add_argument(f"--{name}", type=int, default=default)
    args = parser.parse_args()
    torch.set_num_threads(1)
    shards = open_shards(args.shards)
    arch = architecture(shards.vocab_size, args.hidden, args.seq_length)
    print(
        f"{args.samples} samples, mean {np.mean(shards.lengths[: args.samples]):.0f} tokens, rows of {args.seq_length}"
    )
    found = {}
    with process_groups() as layout:
        for name, way in WAYS.items():
            # In file order, so that all three ways see the same samples; nothing is held back for a second epoch.
            choices = Choices(args.seq_length, shuffle=False, **way)
            dataset = ChatDataset([Some(shards, args.samples)], loss_weights(), choices)
            found[name] = train_once(dataset, arch, layout, way.get("variable", False))
            one = found[name]
            filled, rate = one["tokens"] / one["positions"], one["supervised"] / one["seconds"]
            print(
                f"{name:24} {one['rows']:4} rows  {one['seconds']:7.1f} s  "
                f"{filled:6.1%} of positions are tokens  {rate:7.0f} trained tokens/s"
            )
    assert len({(one["tokens"], one["supervised"]) for one in found.values()}) == 1, (
        "the ways must train on the same tokens"
    )
    packed = found["packed"]["seconds"]
    for name in list(WAYS)[:2]:
        print(f"packed is {found[name]['seconds'] / packed:.1f} times as fast as {name}")


if __name__ == "__main__":
    main()
