"""Claim: on one GPU, without Transformer Engine, flash-attn or apex, training reaches 45% MFU and 1.1 times a transformers loop.

Llama of 1 and 3 billion parameters, bf16 with fp32 main weights, rows of 4096 tokens. First ours, then a transformers loop on the same
GPU: SDPA, torch.compile, fused AdamW, clipping, bf16 autocast over fp32 weights. Layers of the 3b are recomputed, in both.
Made-up weights and tokens: speed does not know them, and benchmarks/train_step.py shows that the two compute the same. Prints tokens/s,
TFLOP/s, MFU and peak memory of each, and the ratio.

    python benchmarks/gpu_training.py [--models 1b 3b] [--steps 10] [--rows 8]
    python benchmarks/gpu_training.py --tiny        # a model of a few layers wherever this runs, CPU included: does the code work?
"""

import argparse
import gc
import os
import statistics
import sys
import time

import torch

from benchmarks.train_step import Conversations
from megatron_ft import device
from megatron_ft.config.sections import Batch, Data, Kernels, Numerics, Optimizer, Parallelism
from megatron_ft.data.loader import ChatDataset, Choices, step_rows
from megatron_ft.data.roles import loss_weights
from megatron_ft.models.architecture import Architecture
from megatron_ft.training.throughput import pairs, peak_tflops, step_flops

WARM_UP = 3


def llama(layers, hidden, heads, groups, ffn, vocab, positions=8192):
    return Architecture(
        family="llama", num_layers=layers, hidden_size=hidden, ffn_hidden_size=ffn, num_attention_heads=heads,
        num_query_groups=groups, head_dim=hidden // heads, vocab_size=vocab, max_position_embeddings=positions,
        norm_epsilon=1e-5, rope_theta=5e5,
    )  # fmt: skip


MODELS = {
    "1b": (llama(16, 2048, 32, 8, 8192, 128256), Numerics(bf16=True)),
    "3b": (llama(28, 3072, 24, 8, 8192, 128256), Numerics(bf16=True, recompute_granularity="full")),
    "tiny": (llama(2, 128, 8, 4, 320, 1024), Numerics(bf16=True)),
}


def our_step(arch: Architecture, numerics: Numerics, dataset: ChatDataset, layout, rows: int):
    """A function of the number of rows consumed."""
    from megatron_ft.engine.optimizer import make_optimizer, make_schedule
    from megatron_ft.training import setup
    from megatron_ft.training.step import Stepper

    data = Data(seq_length=dataset.seq_length, packing=False)
    model = setup.make_model(arch, layout, data, Parallelism(), numerics, Kernels(use_flash_attn=False))
    for weight in model[0].parameters():
        torch.nn.init.normal_(weight, std=0.02) if weight.ndim > 1 else None
    section = Optimizer(lr=1e-5, lr_decay_style="constant")
    optimizer = make_optimizer(model, section, numerics, distributed=False)
    optimizer.reload_model_params()
    make_schedule(optimizer, section, Batch(train_iters=10**6)).step(increment=1)
    stepper = Stepper(model, layout, 1, rows)
    return lambda consumed: stepper.train(dataset, consumed, optimizer).loss


def plain_step(arch: Architecture, numerics: Numerics, dataset: ChatDataset, rows: int, compiled: bool):
    """What most people write, with what makes it fast."""
    from transformers import LlamaConfig, LlamaForCausalLM

    where = device.current_device()
    config = LlamaConfig(
        hidden_size=arch.hidden_size, intermediate_size=arch.ffn_hidden_size, num_hidden_layers=arch.num_layers,
        num_attention_heads=arch.num_attention_heads, num_key_value_heads=arch.num_query_groups,
        vocab_size=arch.vocab_size, max_position_embeddings=arch.max_position_embeddings, attn_implementation="sdpa",
    )  # fmt: skip
    with where:
        model = LlamaForCausalLM(config).train()
    if numerics.recompute_granularity == "full":
        model.gradient_checkpointing_enable({"use_reentrant": False})
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-5, weight_decay=0.01, fused=True)
    forward = torch.compile(model) if compiled else model

    def step(consumed: int) -> float:
        total = 0.0
        for numbers in step_rows(consumed, rows, 1, 0, 1):
            batch = dataset.microbatch(numbers)
            tokens, labels, weights = (
                torch.from_numpy(x).to(where) for x in (batch.tokens, batch.labels, batch.weights)
            )
            with torch.autocast(where.type, torch.bfloat16):
                logits = forward(tokens).logits
            losses = torch.nn.functional.cross_entropy(logits.flatten(0, 1).float(), labels.flatten(), reduction="none")
            loss = (losses * weights.flatten()).sum() / (rows * weights.sum())
            loss.backward()
            total += loss.detach()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
        return float(total)

    return step


def measured(name: str, step, arch: Architecture, rows: int, seq_length: int, steps: int) -> float:
    """Run and print; tokens a second."""
    seconds = []
    for number in range(WARM_UP + steps):
        device.synchronize()
        start = time.perf_counter()
        loss = step(number * rows)
        device.synchronize()
        seconds.append(time.perf_counter() - start)
    assert loss == loss, f"{name}: the loss is not a number"
    tokens = rows * seq_length
    rate = tokens / statistics.median(seconds[WARM_UP:])
    tflops = step_flops(arch, tokens, rows * pairs([seq_length], None)) * rate / tokens / 1e12
    peak = peak_tflops(device.gpu_name() or "")
    mfu = f"{tflops / peak:6.1%} MFU" if peak else "no peak known"
    memory = device.peak_memory_bytes() / 1e9
    print(f"  {name:24} {rate:10.0f} tokens/s  {tflops:7.1f} TFLOP/s  {mfu}  {memory:6.1f} GB", flush=True)
    return rate


def forget() -> None:
    """Give back what the last loop held."""
    gc.collect()
    device.empty_cache()


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--models", nargs="+", choices=MODELS, default=["1b", "3b"])
    parser.add_argument("--tiny", action="store_true")
    for name, default in (("steps", 10), ("rows", 8), ("seq_length", 4096)):
        parser.add_argument(f"--{name}", type=int, default=default)
    args = parser.parse_args()
    if args.tiny:
        args.models, args.steps, args.rows, args.seq_length = ["tiny"], 2, 2, 64
    elif not device.has_gpu():
        print("skipped: no GPU here (--tiny tries the code on a CPU)")
        return 0
    os.environ.setdefault("OMP_NUM_THREADS", "1")
    from megatron_ft.engine.parallel import process_groups

    print(f"{device.describe()}, torch {torch.__version__}, rows of {args.seq_length}, {args.rows} a step")
    with process_groups() as layout:
        for model in args.models:
            arch, numerics = MODELS[model]
            rows = (WARM_UP + args.steps) * args.rows
            chats = Conversations(rows, args.seq_length + 1, arch.vocab_size)
            dataset = ChatDataset([chats], loss_weights(), Choices(args.seq_length, packed=False))
            print(model)
            # Each loop is a temporary: nothing holds the first when the second is made.
            common = (arch, args.rows, args.seq_length, args.steps)
            ours = measured("megatron_ft", our_step(arch, numerics, dataset, layout, args.rows), *common)
            forget()
            compiled = device.has_gpu()
            plain = plain_step(arch, numerics, dataset, args.rows, compiled)
            ratio = ours / measured("transformers" + (" + compile" if compiled else ""), plain, *common)
            del plain
            forget()
            wanted = "" if args.tiny else " (wanted: 1.10 or more, and 45% MFU)"
            print(f"  ratio                    {ratio:10.2f}{wanted}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
