"""Claim: our training step is as fast as a plain transformers + torch loop. One CPU thread, one process, same model, same tokens.
With --processes N: N processes of one thread against one, data and tensor parallel, on the same global batch.

Both loops live in this process and take turns, step by step, so that a machine that slows down slows both. Prints the median
tokens/s of each, their ratio, and the largest difference between the two losses (they compute the same thing).

    python benchmarks/train_step.py [--steps 20] [--hidden 512] [--layers 4] [--seq_length 512] [--processes 2]
"""

import argparse
import os
import statistics
import tempfile
import time
from pathlib import Path

os.environ.setdefault("OMP_NUM_THREADS", "1")

import numpy as np
import torch
from transformers import LlamaConfig, LlamaForCausalLM

from checkpoints_conversion.hf_to_megatron import HfToMegatron, convert
from megatron_ft.config.sections import Batch, Data, Numerics, Optimizer, Parallelism
from megatron_ft.data.loader import ChatDataset, Choices, step_rows
from megatron_ft.data.manifest import Manifest
from megatron_ft.data.roles import byte_weights, loss_weights
from megatron_ft.engine.parallel import ParallelSizes, process_groups

LR, BATCH, MICRO = 1e-4, 4, 2


class Conversations:
    """Random samples that fill their rows, half of each supervised; what the loader wants of shards."""

    prefix = "benchmark"
    manifest = Manifest()

    def __init__(self, count: int, length: int, vocab: int):
        self.ids = np.random.default_rng(0).integers(0, vocab, (count, length))
        self.lengths = np.full(count, length, np.int32)
        self.role = np.repeat([1, 2], [length // 2, length - length // 2]).astype(np.uint8)

    def __len__(self):
        return len(self.ids)

    def tokens(self, i):
        return self.ids[i]

    def role_bytes(self, i):
        return self.role

    def loss_weights(self, by_role, marked_loss_weight=1.0):
        return byte_weights(by_role)


def plain_loop(model, dataset: ChatDataset):
    """A transformers + torch training step, as most people write it: fused AdamW, clipping, gradient accumulation."""
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    optimizer = torch.optim.AdamW(trained, lr=LR, weight_decay=0.01, fused=True)

    def step(consumed: int) -> float:
        batches = [dataset.microbatch(rows) for rows in step_rows(consumed, BATCH, MICRO, 0, 1)]
        supervised = sum(batch.supervised_tokens for batch in batches)
        optimizer.zero_grad()
        total = 0.0
        for batch in batches:
            logits = model(torch.from_numpy(batch.tokens)).logits
            labels = torch.from_numpy(np.where(batch.weights > 0, batch.labels, -100))
            loss = (
                torch.nn.functional.cross_entropy(logits.flatten(0, 1), labels.flatten(), reduction="sum") / supervised
            )
            loss.backward()
            total += loss.item()
        torch.nn.utils.clip_grad_norm_(trained, 1.0)
        optimizer.step()
        return total

    return step


def our_loop(folder: Path, layout, dataset: ChatDataset):
    """megatron_ft's step on the same weights."""
    from megatron_ft.checkpoints.folder import describe, find_checkpoint
    from megatron_ft.checkpoints.load import load_weights
    from megatron_ft.engine.optimizer import make_optimizer, make_schedule
    from megatron_ft.training import setup
    from megatron_ft.training.step import Stepper

    checkpoint = find_checkpoint(folder)
    config = describe(checkpoint)
    model = setup.make_model(
        config.architecture, layout, Data(seq_length=dataset.seq_length), Parallelism(), Numerics()
    )
    load_weights(checkpoint, config, setup.bare(model), layout)
    section = Optimizer(lr=LR, lr_decay_style="constant")
    optimizer = make_optimizer(model, section, Numerics(), distributed=False)
    make_schedule(optimizer, section, Batch(train_iters=10**6)).step(increment=1)
    stepper = Stepper(model, layout, MICRO, BATCH)
    return lambda consumed: stepper.train(dataset, consumed, optimizer).loss


def compare(plain, ours, steps: int, tokens_per_step: int) -> None:
    """Alternate the two for `steps` steps after two of warm-up, and print what came out."""
    seconds, apart = {"plain": [], "ours": []}, 0.0
    for number in range(steps + 2):
        losses = []
        for name, step in (("plain", plain), ("ours", ours)) if number % 2 else (("ours", ours), ("plain", plain)):
            start = time.perf_counter()
            losses.append(step(number * BATCH))
            seconds[name].append(time.perf_counter() - start)
        apart = max(apart, abs(losses[0] - losses[1]))
    rate = {name: tokens_per_step / statistics.median(times[2:]) for name, times in seconds.items()}
    ratios = sorted(a / b for a, b in zip(seconds["plain"][2:], seconds["ours"][2:], strict=True))
    print(f"transformers + torch   {rate['plain']:8.0f} tokens/s")
    print(f"megatron_ft            {rate['ours']:8.0f} tokens/s")
    print(
        f"ratio                  {statistics.median(ratios):8.3f} (pairs: {ratios[0]:.3f} to {ratios[-1]:.3f}; wanted: 0.95 or more)"
    )
    print(f"largest loss difference {apart:.1e}")


def scaling(config: LlamaConfig, dataset: ChatDataset, steps: int, processes: int) -> None:
    """Our step on one process and on several, forked one set after the other; the weights are made up from their names."""
    from megatron_ft.engine.forked import run_forked
    from megatron_ft.models import llama

    arch = llama.from_hf(config.to_dict())
    tokens = BATCH * dataset.seq_length
    layouts = {"one process": (1, Parallelism()), f"{processes} processes, data parallel": (processes, Parallelism())}
    tensor = Parallelism(tensor_model_parallel_size=processes)
    layouts[f"{processes} processes, tensor parallel"] = (processes, tensor)
    rates = {}
    for name, (size, parallel) in layouts.items():
        seconds, loss = run_forked(size, lambda given: timed(arch, dataset, given, steps), parallel)[0]
        rates[name] = tokens / statistics.median(seconds[2:])
        ratio = rates[name] / rates["one process"]
        print(
            f"{name:32} {rates[name]:8.0f} tokens/s  {ratio:5.2f} times one process  (last loss {loss:.6f})", flush=True
        )


def timed(arch, dataset: ChatDataset, parallel: Parallelism, steps: int) -> tuple[list[float], float]:
    """On every rank: seconds of each step, and the last loss."""
    from megatron_ft.engine.optimizer import make_optimizer, make_schedule
    from megatron_ft.training import invariance, setup
    from megatron_ft.training.step import Stepper

    with process_groups(ParallelSizes(parallel.tensor_model_parallel_size)) as layout:
        model = setup.make_model(arch, layout, Data(seq_length=dataset.seq_length, packing=False), parallel, Numerics())
        invariance.make_up_weights(setup.bare(model), arch)
        section = Optimizer(lr=LR, lr_decay_style="constant")
        optimizer = make_optimizer(model, section, Numerics(), distributed=False)
        make_schedule(optimizer, section, Batch(train_iters=10**6)).step(increment=1)
        stepper, seconds = Stepper(model, layout, MICRO, BATCH), []
        for number in range(steps + 2):
            start = time.perf_counter()
            loss = stepper.train(dataset, number * BATCH, optimizer).loss
            seconds.append(time.perf_counter() - start)
        return seconds, loss


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    for name, default in (("steps", 20), ("hidden", 512), ("layers", 4), ("seq_length", 512), ("vocab", 8192)):
        parser.add_argument(f"--{name}", type=int, default=default)
    parser.add_argument("--processes", type=int, default=0)
    args = parser.parse_args()
    torch.set_num_threads(1)
    config = LlamaConfig(
        hidden_size=args.hidden, intermediate_size=args.hidden * 11 // 4, num_hidden_layers=args.layers,
        num_attention_heads=8, num_key_value_heads=4, vocab_size=args.vocab, max_position_embeddings=args.seq_length,
    )  # fmt: skip
    torch.manual_seed(0)
    dataset = ChatDataset(
        [Conversations((args.steps + 2) * BATCH, args.seq_length + 1, args.vocab)],
        loss_weights(), Choices(args.seq_length, packed=False),
    )  # fmt: skip
    if args.processes:
        return scaling(config, dataset, args.steps, args.processes)
    with tempfile.TemporaryDirectory() as folder, process_groups() as layout:
        model = LlamaForCausalLM(config)
        model.save_pretrained(Path(folder) / "hf")
        convert(HfToMegatron(input_dir=f"{folder}/hf", output_dir=f"{folder}/ours", ckpt_format="torch"))
        size = sum(p.numel() for p in model.parameters())
        print(f"{size / 1e6:.1f} M parameters, rows of {args.seq_length}, {BATCH} a step, torch {torch.__version__}")
        ours = our_loop(Path(folder) / "ours", layout, dataset)
        compare(plain_loop(model, dataset), ours, args.steps, BATCH * args.seq_length)


if __name__ == "__main__":
    main()
