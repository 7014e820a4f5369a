"""Tokens per second of a ReLU model on a CPU: dense, exact and predicted with the same kernel, in turns, beside the speed of memory."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch

from megatron_ft.engine.parallel import ParallelSizes, process_groups
from megatron_ft.evaluation.measuring.job import Message, check_lengths
from megatron_ft.generation.sparse_loading import Stored, open_sparse
from megatron_ft.generation.throughput import Throughput
from megatron_ft.sparse.mlp import Mode
from megatron_ft.sparse.model import SparseModel
from megatron_ft.sparse.rows import Precision, empty, read_speed
from megatron_ft.wording import counted as in_words

READ = 1 << 26
"""Numbers that are read to measure memory, 256 MiB: more than the caches of most machines."""


@dataclass(frozen=True)
class Sample:
    """Amount of one call (tokens or bytes), and how long it took."""

    amount: float
    seconds: float
    cpu_seconds: float


@dataclass(frozen=True)
class Speed:
    """What was measured of a mode: medians over the rounds."""

    mode: str
    tokens_per_second: float
    cpu_ms_per_token: float
    zeros: float
    """share of activations that were zero"""
    computed: float
    """share of rows of the first matrix that were read"""
    bytes_per_token: float

    @property
    def bytes_per_second(self) -> float:
        return self.bytes_per_token * self.tokens_per_second


def in_turns(calls: Mapping[str, Callable[[], Sample]], rounds: int) -> dict[str, list[Sample]]:
    """Call all of them one after another, `rounds` times: what slows the machine slows each. The first round does not count."""
    found: dict[str, list[Sample]] = {name: [] for name in calls}
    for number in range(rounds + 1):
        for name, call in calls.items():
            sample = call()
            if number:
                found[name].append(sample)
    return found


def timed(call: Callable[[], float]) -> Sample:
    """Time a call that returns its amount."""
    start, cpu = time.perf_counter(), time.process_time()
    amount = call()
    return Sample(amount, time.perf_counter() - start, time.process_time() - cpu)


def reader() -> Callable[[], Sample]:
    """Return a call that reads memory."""
    numbers = empty(1, READ, torch.float32).fill_(1.0)[0]

    def read() -> float:
        read_speed(numbers)
        return float(numbers.nbytes)

    return lambda: timed(read)


def rate(samples: Sequence[Sample]) -> float:
    """Return the median of amount per second."""
    return statistics.median(one.amount / one.seconds for one in samples)


def speed(mode: Mode, samples: Sequence[Sample], counted: Sequence[float]) -> Speed:
    """Return the medians of a mode. counted: the last three entries of a Speed."""
    cpu = statistics.median(1000 * one.cpu_seconds / one.amount for one in samples)
    return Speed(mode, rate(samples), cpu, *counted)


def counts(sparse: SparseModel) -> list[float]:
    """Return the last three entries of a Speed, of the tokens since the model's mode was set."""
    return [sparse.zeros, sparse.computed, sparse.bytes_per_token(sparse.mode)]


def measure(
    model: Path,
    conversations: Sequence[list[Message]],
    max_new_tokens: int,
    precision: Precision | None,
    predictors: Stored | None,
) -> dict[str, Any]:
    """Return what is measured of a model: a Speed of each mode, the bytes that memory reads in a second, whether exact answers as dense."""
    with process_groups(ParallelSizes()) as layout:
        chat, sparse = open_sparse(model, layout, precision, "dense", predictors)
        prompts = [chat.prompt_ids(messages) for messages in conversations]
        check_lengths([ids.tolist() for ids in prompts], max_new_tokens, chat.decoder.max_positions)
        chat.decoder.stop_ids = set()
        answers: dict[str, list] = {}

        def decode(mode: Mode) -> Sample:
            sparse.mode, chat.decoder.throughput, cpu = mode, Throughput(), time.process_time()
            ids = prompts[len(answers.setdefault(mode, [])) % len(prompts)]
            answers[mode].append(chat.decoder.generate([ids], max_new_tokens)[0])
            counted[mode] = counts(sparse)
            done = chat.decoder.throughput
            return Sample(done.new_tokens - 1, done.new_seconds, time.process_time() - cpu)

        counted: dict[str, list[float]] = {}
        modes: tuple[Mode, ...] = ("dense", "exact", "predicted") if predictors else ("dense", "exact")
        calls: dict[str, Callable[[], Sample]] = {"read": reader()}
        calls |= {mode: partial(decode, mode) for mode in modes}
        samples = in_turns(calls, len(prompts))
        found = [speed(mode, samples[mode], counted[mode]) for mode in modes]
        return {
            "modes": [asdict(one) for one in found], "read_bytes_per_second": rate(samples["read"]), "threads": torch.get_num_threads(),
            "precision": precision or "as stored", "exact_is_dense": answers["exact"] == answers["dense"],
        }  # fmt: skip


def table(result: Mapping[str, Any]) -> str:
    """Return the table for a terminal."""
    found = [Speed(**one) for one in result["modes"]]
    lines = [
        f"{'':10}{'tokens/s':>10}{'speed-up':>10}{'CPU ms/token':>14}{'zeros':>8}{'rows read':>11}{'GB/token':>10}{'GB/s':>7}"
    ]
    for one in found:
        gain = one.tokens_per_second / found[0].tokens_per_second
        lines.append(
            f"{one.mode:10}{one.tokens_per_second:10.2f}{gain:10.2f}{one.cpu_ms_per_token:14.1f}{100 * one.zeros:7.1f}%"
            f"{100 * one.computed:10.1f}%{one.bytes_per_token / 1e9:10.3f}{one.bytes_per_second / 1e9:7.1f}"
        )
    read = result["read_bytes_per_second"] / 1e9
    same = "the same answers as" if result["exact_is_dense"] else "OTHER ANSWERS than"
    lines.append(f"memory: {read:.1f} GB/s read with {in_words(result['threads'], 'thread')}; exact gave {same} dense")
    return "\n".join(lines)
