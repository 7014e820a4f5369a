"""Decode with layers of Falcon-40B's size on a CPU: torch dense, and dense, exact and predicted with this project's kernel, in turns.

    python benchmarks/sparse_decode.py [--layers 2] [--weights bf16] [--zeros 0.94] [--rank 512] [--rounds 7] [--tokens 6]

What is real: sizes of a layer, the engine's model and KV cache, the kernel, bytes and times. What is made up: the weights are random, and
planted. The first matrix of the MLP is a random matrix of rank --rank with a tenth of its energy in noise, and a constant in the norm's
bias moves all activations down until the wanted share is zero. So predictors exist here by construction, and their recall says nothing
about trained models: benchmarks/sparse_model.py trains one for that, and megatron-ft train-predictors measures it.
"""

import argparse
import os
from functools import partial

os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")  # as generate --sparse does
import torch

from megatron_ft.engine.parallel import ParallelSizes, process_groups
from megatron_ft.engine.start import prepare_engine
from megatron_ft.evaluation.measuring.sparse import Sample, Speed, counts, in_turns, rate, reader, speed, timed
from megatron_ft.models.architecture import Architecture
from megatron_ft.sparse.fitting import _with_recall, quality
from megatron_ft.sparse.model import make_sparse
from megatron_ft.sparse.predictors import Thin

NOISE, RECALL, PROMPT = 0.1, 0.98, 4
FALCON_40B = {
    "layers": 60,
    "hidden": 8192,
    "ffn": 32768,
    "heads": 128,
    "groups": 8,
    "head_dim": 64,
    "vocabulary": 65024,
}


def architecture(options: argparse.Namespace) -> Architecture:
    return Architecture(
        family="falcon", num_layers=options.layers, hidden_size=options.hidden, ffn_hidden_size=4 * options.hidden,
        num_attention_heads=options.hidden // 64, num_query_groups=8, head_dim=64, vocab_size=1024, max_position_embeddings=512,
        norm_epsilon=1e-5, norm="layernorm", activation="relu", tied_embeddings=True, parallel_block=True,
    )  # fmt: skip


@torch.no_grad()
def plant(model, arch: Architecture, options: argparse.Namespace) -> list[Thin]:
    """Fill the model. Return the predictors that the planted matrices have."""
    generator = torch.Generator().manual_seed(0)
    for name, parameter in model.named_parameters():
        if parameter.dim() == 2 and "linear_fc1" not in name:
            parameter.normal_(0, parameter.shape[1] ** -0.5, generator=generator)
    return [plant_mlp(layer, arch, options, generator) for layer in model.decoder.layers]


def plant_mlp(layer, arch: Architecture, options: argparse.Namespace, generator: torch.Generator) -> Thin:
    """Set the first matrix and the norm before it, whose output has zero mean besides its bias of ones."""
    hidden, ffn, rank = arch.hidden_size, arch.ffn_hidden_size, options.rank
    low = torch.randn(rank, hidden, generator=generator) / hidden**0.5
    high = torch.randn(ffn, rank, generator=generator) * ((1 - NOISE) / rank) ** 0.5
    cut = (
        torch.distributions.Normal(0, 1).icdf(torch.tensor(options.zeros)) * 2**0.5
    )  # of the token's part and of the bias's part
    weight = layer.mlp.linear_fc1.weight
    for some in torch.arange(ffn).split(4096):
        noise = torch.randn(len(some), hidden, generator=generator) * (NOISE / hidden) ** 0.5
        weight[some] = (high[some] @ low + noise - cut / hidden).to(weight.dtype)
    layer.pre_mlp_layernorm.bias.fill_(1.0)
    matrix = weight.float()
    inputs = torch.randn(64, hidden, generator=generator) + 1
    thin = Thin(low, high, matrix.sum(1) - high @ low.sum(1))
    thin = _with_recall(matrix, inputs, thin, RECALL)
    found = quality(matrix, torch.randn(64, hidden, generator=generator) + 1, thin)
    print(
        f"planted layer: {100 * found.active:.1f}% active, {100 * found.rows:.1f}% predicted, recall {100 * found.recall:.1f}%"
    )
    return thin


@torch.no_grad()
def decode(model, tokens: int) -> Sample:
    """Read a prompt, then time single tokens."""
    from megatron.core.inference.contexts.static_context import StaticInferenceContext

    cache = StaticInferenceContext(1, PROMPT + tokens)

    def step(ids: torch.Tensor) -> torch.Tensor:
        start = cache.sequence_len_offset
        positions = torch.arange(start, start + ids.shape[1])[None]
        logits = model(ids, positions, None, inference_context=cache, runtime_gather_output=True)
        cache.sequence_len_offset += ids.shape[1]
        cache.enable_decode_mode()
        return logits[:, -1:].argmax(-1)

    state = [step(torch.arange(PROMPT)[None])]

    def rest() -> float:
        for _ in range(tokens):
            state[0] = step(state[0])
        return float(tokens)

    return timed(rest)


def bytes_of_40b(sizes: dict, weight: float, zeros: float, rows: float, rank: int, mode: str) -> float:
    """Return the bytes that one token of Falcon-40B reads. rows: share of the first matrix's rows that are computed."""
    hidden, ffn = sizes["hidden"], sizes["ffn"]
    attention = hidden * sizes["head_dim"] * (2 * sizes["heads"] + 2 * sizes["groups"])
    first, down = {"dense": (1, 1), "exact": (1, 1 - zeros), "predicted": (rows, 1 - zeros)}[mode]
    predictor = rank * (hidden + ffn) if mode == "predicted" else 0
    return weight * (
        sizes["layers"] * (attention + hidden * ffn * (first + down) + predictor) + hidden * sizes["vocabulary"]
    )


def report(found: dict[str, Speed], samples: dict[str, list[Sample]], options: argparse.Namespace) -> None:
    """Print medians of wall time, and the least CPU time of a token: other programs make the first longer, hardly the second."""
    dense, read = found["dense"], rate(samples["read"])
    least = {name: min(1000 * one.cpu_seconds / one.amount for one in taken) for name, taken in samples.items()}
    rates = {name: rate(samples[name]) for name in ("torch", *found)}
    print(
        f"{'':10}{'tokens/s':>9}{'speed-up':>9}{'CPU ms':>8}{'speed-up':>9}{'zeros':>7}{'rows':>7}{'GB/token':>9}{'GB/CPU s':>9}"
    )
    for name, speed_of in rates.items():
        line = f"{name:10}{speed_of:9.2f}{speed_of / rates['dense']:9.2f}{least[name]:8.1f}{least['dense'] / least[name]:9.2f}"
        if name in found:
            one = found[name]
            line += f"{100 * one.zeros:6.1f}%{100 * one.computed:6.1f}%{one.bytes_per_token / 1e9:9.3f}"
            line += f"{one.bytes_per_token / least[name] / 1e6:9.1f}"
        print(line)
    times = read / dense.bytes_per_second, least["dense"] / dense.bytes_per_token / least["read"]
    print(
        f"reading memory in the same turns: {read / 1e9:.1f} GB/s, at best {1e-6 / least['read']:.1f} GB a CPU second; "
        f"dense decoding takes {times[0]:.2f} of its time, {times[1]:.2f} of its CPU time"
    )
    size, zeros, rows = {"fp32": 4, "bf16": 2, "int8": 1}[options.weights], dense.zeros, found["predicted"].computed
    all_bytes = {mode: bytes_of_40b(FALCON_40B, size, zeros, rows, options.rank, mode) for mode in found}
    print(f"Falcon-40B by arithmetic, {options.weights}, the same shares:")
    for mode, count in all_bytes.items():
        print(
            f"{mode:12}{count / 1e9:7.2f} GB/token, {all_bytes['dense'] / count:.2f} x, {read / count:.2f} tokens/s at this memory"
        )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    for name, value in (("layers", 2), ("hidden", 8192), ("rank", 512), ("rounds", 7), ("tokens", 6)):
        parser.add_argument(f"--{name}", type=int, default=value)
    parser.add_argument("--weights", choices=["fp32", "bf16", "int8"], default="bf16")
    parser.add_argument("--zeros", type=float, default=0.94)
    options = parser.parse_args()
    prepare_engine()
    from megatron_ft.models.build import BuildOptions, build_model

    arch = architecture(options)
    with process_groups(ParallelSizes()) as layout, torch.no_grad():
        plain, ours = (build_model(arch, layout, BuildOptions(dtype=torch.bfloat16)).eval() for _ in range(2))
        predictors = plant(plain, arch, options)
        for mine, theirs in zip(ours.parameters(), plain.parameters(), strict=True):
            mine.data = theirs.data
        count = sum(parameter.numel() for parameter in plain.parameters())
        threads = f"{torch.get_num_threads()} thread(s) of {os.cpu_count()} CPUs"
        print(f"{count / 1e9:.2f} G weights; torch in bf16: {2 * count / 1e9:.2f} GB; {threads}")
        sparse = make_sparse(ours, arch, options.weights)
        sparse.predict_with(predictors, "int8" if options.weights == "int8" else "bf16")
        counted: dict[str, list[float]] = {}

        def run(mode) -> Sample:
            sparse.mode = mode
            sample = decode(ours, options.tokens)
            counted[mode] = counts(sparse)
            return sample

        calls = {"read": reader(), "torch": partial(decode, plain, options.tokens)}
        calls |= {mode: partial(run, mode) for mode in ("dense", "exact", "predicted")}
        samples = in_turns(calls, options.rounds)
        found = {mode: speed(mode, samples[mode], counted[mode]) for mode in ("dense", "exact", "predicted")}
        report(found, samples, options)


if __name__ == "__main__":
    main()
