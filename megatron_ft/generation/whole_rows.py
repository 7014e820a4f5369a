"""Greedy answers of a model in training: no KV cache, every token is a forward pass over whole rows.

Decoder reads single tokens, which sequence parallelism cannot split, and one chunk per stage. Here the model stays as training built it:
its wrappers, sequence parallelism, interleaved stages. Rows are padded to the right to a multiple of the tensor-parallel size; attention
is causal, so that padding changes no answer. It costs about as many times more as an answer has tokens, and no second copy of the weights.
Nothing is drawn and nothing of the training state changes.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterator, Sequence
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
from megatron.core import parallel_state
from megatron.core.pipeline_parallel import get_forward_backward_func
from megatron.core.tensor_parallel import gather_from_tensor_model_parallel_region
from torch import Tensor

from megatron_ft import device
from megatron_ft.engine.exchange import known_shapes
from megatron_ft.engine.parallel import Layout

STEP = 64
"""Widths of rows are multiples of this, so that kernels are compiled for few of them."""


class RowDecoder:
    """Answers with the chunks of this rank's stage, wrapped as training wraps them.

    longest: positions of prompt and answer together. tokens_per_pass: of the rows of one microbatch, so that a pass needs no more memory
    than a step.
    """

    def __init__(
        self, chunks: list, layout: Layout, stop_ids: Collection[int], vocab_size: int, longest: int, tokens_per_pass: int
    ):  # fmt: skip
        self.chunks, self.layout, self.config = chunks, layout, chunks[0].config
        self.stop_ids, self.vocab_size = set(stop_ids), vocab_size
        self.longest, self.tokens_per_pass = longest, tokens_per_pass
        self.device = device.current_device()
        # The engine's interleaved schedule needs as many microbatches as there are stages.
        self.microbatches = layout.pp_size if layout.vp_size > 1 else 1
        members = dist.get_process_group_ranks(parallel_state.get_model_parallel_group())
        self.choosing_rank = members[-layout.tp_size]

    @torch.no_grad()
    def generate(self, prompts: Sequence[np.ndarray], max_new_tokens: int) -> list[list[int]]:
        """Return the ids after each prompt, up to and without the stop token. All ranks of a model call it with the same arguments."""
        modes = [chunk.training for chunk in self.chunks]
        for chunk in self.chunks:
            chunk.eval()
        try:
            answers: list[list[int]] = [[] for _ in prompts]
            for batch in self._batches([len(prompt) for prompt in prompts], max_new_tokens):
                for i, answer in zip(batch, self._batch([prompts[i] for i in batch], max_new_tokens), strict=True):
                    answers[i] = answer
            return answers
        finally:
            for chunk, mode in zip(self.chunks, modes, strict=True):
                chunk.train(mode)

    def _batches(self, lengths: list[int], max_new_tokens: int) -> Iterator[list[int]]:
        """Yield indices of prompts that are answered together, the longest prompts first."""
        order = sorted(range(len(lengths)), key=lambda i: -lengths[i])
        while order:
            rows = max(1, self.tokens_per_pass // self._width(lengths[order[0]] + max_new_tokens))
            yield order[: rows * self.microbatches]
            order = order[rows * self.microbatches :]

    def _width(self, length: int) -> int:
        """Return the width of rows for texts of up to `length` tokens, a multiple of the tensor-parallel size."""
        unit = self.layout.tp_size
        return min(-(-length // (STEP * unit)) * STEP, -(-self.longest // unit)) * unit

    def _batch(self, prompts: list[np.ndarray], max_new_tokens: int) -> list[list[int]]:
        starts = torch.tensor([len(prompt) for prompt in prompts], device=self.device)
        limits = (starts + max_new_tokens).clamp(max=self.longest)
        tokens = torch.zeros((len(prompts), self._width(int(limits.max()))), dtype=torch.long, device=self.device)
        for row, prompt in zip(tokens, prompts, strict=True):
            row[: len(prompt)] = torch.as_tensor(np.asarray(prompt, dtype=np.int64))
        stops = torch.tensor(sorted(self.stop_ids) or [-1], device=self.device)
        ends, open_ = starts.clone(), starts < limits
        while open_.any():
            chosen = self._next(tokens[:, : self._width(int(ends.max()))], ends)
            open_ &= ~torch.isin(chosen, stops)
            tokens[open_, ends[open_]] = chosen[open_]
            ends += open_
            open_ &= ends < limits
        return [row[start:end].tolist() for row, start, end in zip(tokens, starts.tolist(), ends.tolist(), strict=True)]

    def _next(self, tokens: Tensor, ends: Tensor) -> Tensor:
        """Return the most likely token [n] after the first `ends` tokens of each row of tokens [n, width], the same on all ranks."""
        count = len(tokens)
        padding = -count % self.microbatches
        rows = torch.cat(
            [torch.arange(count, device=self.device), torch.zeros(padding, dtype=torch.long, device=self.device)]
        )
        logits = self._logits(list(tokens[rows].chunk(self.microbatches)), list(ends[rows].chunk(self.microbatches)))
        chosen = torch.zeros(count, dtype=torch.long, device=self.device)
        if logits:  # on the last stage
            whole = gather_from_tensor_model_parallel_region(torch.cat(logits))
            chosen = whole[:count, : self.vocab_size].argmax(-1)
        dist.broadcast(chosen, src=self.choosing_rank, group=parallel_state.get_model_parallel_group())
        return chosen

    def _logits(self, tokens: list[Tensor], ends: list[Tensor]) -> list[Tensor]:
        """Return this rank's part of the logits at the last token of each row, [b, v/tp] per microbatch; [] before the last stage."""
        rows, width = tokens[0].shape
        positions = torch.arange(width, device=self.device).expand(rows, width)

        def forward(batches: Iterator[tuple[Tensor, Tensor]], model: Any) -> tuple[Tensor, Callable]:
            ids, lengths = next(batches)

            def last(output: Tensor, non_loss_data: bool = False) -> Tensor:
                return output[torch.arange(rows, device=self.device), lengths - 1]

            return model(ids, positions, None), last

        batches = [iter(list(zip(tokens, ends, strict=True))) for _ in self.chunks]
        return get_forward_backward_func()(
            forward_step_func=forward,
            data_iterator=batches if len(self.chunks) > 1 else batches[0],
            model=self.chunks,
            num_microbatches=self.microbatches,
            seq_length=width,
            micro_batch_size=rows,
            forward_only=True,
            collect_non_loss_data=True,
            **self._exchange(width, rows),
        )

    def _exchange(self, width: int, rows: int) -> dict:
        """Return how stages exchange rows where training's differ in length; {}: as always."""
        if not (self.config.variable_seq_lengths and self.layout.pp_size > 1):
            return {}
        cut = self.layout.tp_size if self.layout.sequence_parallel else 1
        return known_shapes(self.config, [(width // cut, rows, self.config.hidden_size)] * self.microbatches)
