"""Decoding with a KV cache, in any tensor x pipeline layout.

The engine's forward-only schedule passes activations between stages. The last stage samples each token and broadcasts it, so that
every rank of a model holds the same text. Prompts of different lengths share a batch: a first pass reads as many tokens as the
shortest prompt has. Then all sequences advance one token at a time, and longer prompts still read their own tokens. This is exact
and needs no padding or masks. Prompts that are much longer than the others are a batch of their own (batches.py).
"""

from __future__ import annotations

import time
from collections.abc import Callable, Collection, Sequence
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
from megatron.core import parallel_state
from megatron.core.inference.contexts.static_context import StaticInferenceContext
from megatron.core.pipeline_parallel import get_forward_backward_func

from megatron_ft import device
from megatron_ft.engine.parallel import Layout
from megatron_ft.errors import ConfigError
from megatron_ft.generation.batches import batches
from megatron_ft.generation.sampling import GREEDY, Sampling, choose
from megatron_ft.generation.throughput import Throughput
from megatron_ft.wording import counted


class Decoder:
    """Generates with an unwrapped model without sequence parallelism, whose weights are loaded."""

    def __init__(self, model: Any, layout: Layout, stop_ids: Collection[int], max_positions: int):
        assert not model.config.sequence_parallel, "single tokens cannot be split along the sequence"
        self.model, self.layout = model.eval(), layout
        self.stop_ids, self.max_positions = set(stop_ids), max_positions
        self.device = device.current_device()
        members = dist.get_process_group_ranks(parallel_state.get_model_parallel_group())
        self.sampling_rank = members[-layout.tp_size]
        self.throughput = Throughput()

    @torch.no_grad()
    def generate(
        self, prompts: Sequence[np.ndarray], max_new_tokens: int, sampling: Sampling = GREEDY,
        batch_size: int = 32, seed: int = 0, is_over: Callable[[list[int]], bool] | None = None,
        advance: Callable[[int], Any] = lambda _: None, after_token: Callable[[list[int]], bool] | None = None,
    ) -> list[list[int]]:  # fmt: skip
        """Return the ids after each prompt, up to and without the stop token. All ranks of a model call it with the same arguments.

        is_over: says of the ids of an answer so far if the answer ends with them. advance: is told how many prompts were answered.
        after_token: is told the ids so far of a batch's first answer, after each token but its last; True ends the batch.
        Raise ConfigError for an empty prompt and for one that fills the model's context.
        """
        for number, prompt in enumerate(prompts):
            if not 0 < len(prompt) < self.max_positions:
                raise ConfigError(
                    f"prompt {number} has {counted(len(prompt), 'token')}; the model accepts 1 to {self.max_positions - 1}: shorten it"
                )
        generator = torch.Generator(self.device).manual_seed(seed)
        answers: list[list[int]] = [[] for _ in prompts]
        for batch in batches([len(prompt) for prompt in prompts], batch_size, max_new_tokens):
            texts = self._batch([prompts[i] for i in batch], max_new_tokens, sampling, generator, is_over, after_token)
            for i, text in zip(batch, texts, strict=True):
                answers[i] = text
            advance(len(batch))
        return answers

    def _batch(
        self, prompts: list[np.ndarray], max_new_tokens: int, sampling: Sampling, generator: torch.Generator,
        is_over: Callable[[list[int]], bool] | None, after_token: Callable[[list[int]], bool] | None,
    ) -> list[list[int]]:  # fmt: skip
        lengths = torch.tensor([len(prompt) for prompt in prompts], device=self.device)
        shortest, longest = int(lengths.min()), int(lengths.max())
        limit = min(longest + max_new_tokens, self.max_positions)
        ends = (lengths + max_new_tokens).clamp(max=limit)
        tokens = torch.zeros((len(prompts), limit), dtype=torch.long, device=self.device)
        for row, prompt in zip(tokens, prompts, strict=True):
            row[: len(prompt)] = torch.as_tensor(np.asarray(prompt, dtype=np.int64))
        stops = torch.tensor(sorted(self.stop_ids) or [-1], device=self.device)
        finished = torch.zeros(len(prompts), dtype=torch.bool, device=self.device)
        cache = StaticInferenceContext(len(prompts), limit)
        read = 0
        for position in range(shortest, limit):
            started = time.perf_counter()
            chosen = self._next(tokens[:, :position], read, cache, sampling, generator)
            device.synchronize()
            self.throughput.add(read == 0, lengths, read, position, finished, time.perf_counter() - started)
            read = position
            is_prompt = position < lengths
            tokens[:, position] = torch.where(is_prompt, tokens[:, position], chosen)
            finished |= ~is_prompt & (torch.isin(chosen, stops) | (position + 1 >= ends))
            if is_over:
                self._end(tokens[:, : position + 1], lengths, finished, is_over)
            if finished.all():
                break
            if after_token and after_token(tokens[0, int(lengths[0]) : position + 1].tolist()):
                ends = ends.clamp(max=position + 1)
                break
        return [
            self._answer(row.tolist(), start, end, is_over)
            for row, start, end in zip(tokens, lengths.tolist(), ends.tolist(), strict=True)
        ]

    def _end(
        self, tokens: torch.Tensor, lengths: torch.Tensor, finished: torch.Tensor, is_over: Callable[[list[int]], bool]
    ) -> None:
        """Mark the answers that are over as finished."""
        rows = zip(tokens.tolist(), lengths.tolist(), finished.tolist(), strict=True)
        for i, (row, start, done) in enumerate(rows):
            if not done and len(row) > start and is_over(row[start:]):
                finished[i] = True

    def _next(
        self, tokens: torch.Tensor, read: int, cache: Any, sampling: Sampling, generator: torch.Generator
    ) -> torch.Tensor:
        """Read the tokens [b, n] from `read` on into the cache. Return the next of each sequence, [b], the same on all ranks."""
        new_tokens = tokens[:, read:]
        batch, count = new_tokens.shape
        logits = get_forward_backward_func()(
            forward_step_func=lambda _, model: (self._forward(model, new_tokens, cache), _pass_through),
            data_iterator=iter(()),
            model=[self.model],
            num_microbatches=1,
            seq_length=count,
            micro_batch_size=batch,
            forward_only=True,
            collect_non_loss_data=True,
        )
        cache.sequence_len_offset += count
        cache.enable_decode_mode()
        chosen = torch.zeros(batch, dtype=torch.long, device=self.device)
        if dist.get_rank() == self.sampling_rank:
            chosen = choose(logits[0][:, -1, : self.model.true_vocab_size], sampling, generator, tokens)
        dist.broadcast(chosen, src=self.sampling_rank, group=parallel_state.get_model_parallel_group())
        return chosen

    def _forward(self, model: Any, tokens: torch.Tensor, cache: Any) -> torch.Tensor:
        start = cache.sequence_len_offset
        positions = torch.arange(start, start + tokens.shape[1], device=self.device).expand_as(tokens)
        return model(tokens, positions, None, inference_context=cache, runtime_gather_output=True)

    def _answer(self, row: list[int], start: int, end: int, is_over: Callable[[list[int]], bool] | None) -> list[int]:
        """Return a row's answer up to its first stop token, or up to where it was over; later tokens belong to other rows' steps."""
        text = row[start:end]
        first_stop = next((i for i, token in enumerate(text) if token in self.stop_ids), len(text))
        over = (i for i in range(1, first_stop) if is_over(text[:i])) if is_over else iter(())
        return text[: next(over, first_stop)]


def _pass_through(output: torch.Tensor, non_loss_data: bool = False) -> torch.Tensor:
    return output
