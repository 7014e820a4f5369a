"""Claim: with the KV cache a token after a prompt of 8K takes a small part of the time that it takes without, and the cache has the size
of its formula: 2 x rows x positions x layers of the stage x query groups of the rank x head size x bytes per number.

A small Llama answers greedily, split as TP x PP over processes of this machine. Without the cache each token is a pass over the whole text.
Both must choose the same tokens.

    python benchmarks/kv_cache.py [--length 8192] [--new 8] [--tp 2] [--pp 2] [--hidden 256] [--layers 4] [--bf16]

Prints seconds per token both ways, their ratio, and the bytes of the cache on each rank against the formula.
"""

from __future__ import annotations

import argparse
import os
import sys
import tempfile
import time
from pathlib import Path

os.environ.setdefault("OMP_NUM_THREADS", "1")
sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import numpy as np
import torch
from transformers import LlamaConfig, LlamaForCausalLM

from checkpoints_conversion.hf_to_megatron import HfToMegatron, convert
from megatron_ft.planner.answering import Reader
from tests.ranks import Ranks

VOCABULARY = 1000


def make(folder: Path, arguments: argparse.Namespace) -> Path:
    """Write a random model as a torch_dist checkpoint."""
    torch.manual_seed(1)
    config = LlamaConfig(
        vocab_size=VOCABULARY, hidden_size=arguments.hidden, intermediate_size=3 * arguments.hidden,
        num_hidden_layers=arguments.layers, num_attention_heads=8, num_key_value_heads=4,
        max_position_embeddings=arguments.length + arguments.new, initializer_range=0.2,
    )  # fmt: skip
    LlamaForCausalLM(config).save_pretrained(folder / "hf")
    convert(HfToMegatron(str(folder / "hf"), str(folder / "checkpoint")))
    return folder / "checkpoint"


def measure(root: Path, sizes: tuple[int, int], prompt: np.ndarray, count: int, bf16: bool) -> dict:
    """Answer with and without the cache. Return tokens, seconds per token, and the bytes of this rank's cache and of the formula."""
    from megatron_ft.checkpoints.folder import describe, find_checkpoint
    from megatron_ft.checkpoints.load import load_weights
    from megatron_ft.engine.parallel import ParallelSizes, process_groups
    from megatron_ft.generation import decoding
    from megatron_ft.generation.throughput import Throughput
    from megatron_ft.models.build import BuildOptions, build_model

    caches = []
    real = decoding.StaticInferenceContext
    decoding.StaticInferenceContext = lambda *sizes: caches.append(real(*sizes)) or caches[-1]
    with process_groups(ParallelSizes(*sizes)) as layout:
        folder = find_checkpoint(root)
        config = describe(folder)
        model = build_model(config.architecture, layout, BuildOptions(dtype=torch.bfloat16 if bf16 else torch.float32))
        load_weights(folder, config, model, layout)
        decoder = decoding.Decoder(model, layout, (), config.architecture.max_position_embeddings)
        decoder.generate([prompt[:64]], 2)  # the first pass allocates and compiles
        decoder.throughput = Throughput()
        (cached,) = decoder.generate([prompt], count)
        held = sum(tensor.nbytes for pair in caches[-1].key_value_memory_dict.values() for tensor in pair)
        again = decoding.Decoder(model, layout, (), config.architecture.max_position_embeddings)
        text, started = list(prompt), time.perf_counter()
        for _ in range(count):
            text += again.generate([np.array(text)], 1)[0]
        reader = Reader(config.architecture, 2 if bf16 else 4, len(prompt) + count)
        layers = config.architecture.num_layers // layout.pp_size
        return {
            "same": text[len(prompt) :] == cached,
            "with": decoder.throughput.new_seconds / (count - 1),
            "without": (time.perf_counter() - started) / count,
            "bytes": held,
            "formula": reader.cache(layout.tp_size, layers),
        }


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    for name, default in (("length", 8192), ("new", 8), ("tp", 2), ("pp", 2), ("hidden", 256), ("layers", 4)):
        parser.add_argument(f"--{name}", type=int, default=default)
    parser.add_argument("--bf16", action="store_true")
    arguments = parser.parse_args()
    prompt = np.random.default_rng(2).integers(0, VOCABULARY, arguments.length)
    with tempfile.TemporaryDirectory() as place:
        root = make(Path(place), arguments)
        ranks = Ranks(arguments.tp * arguments.pp)
        found = ranks.run(
            measure, root, (arguments.tp, arguments.pp), prompt, arguments.new, arguments.bf16, timeout=3600
        )
        ranks.close()
    first = found[0]
    print(f"TP{arguments.tp} x PP{arguments.pp}, a prompt of {arguments.length:,} tokens, {arguments.new} new ones")
    print(f"with the cache     {first['with']:.4f} s per token")
    print(
        f"without            {first['without']:.4f} s per token, {first['without'] / first['with']:.1f} times as long"
    )
    for number, one in enumerate(found):
        print(f"rank {number}: cache {one['bytes']:,} bytes, formula {one['formula']:,}")
    agreed = all(one["same"] and one["bytes"] == one["formula"] for one in found)
    print("same tokens, bytes as the formula" if agreed else "NOT the same")
    return int(not agreed)


if __name__ == "__main__":
    sys.exit(main())
