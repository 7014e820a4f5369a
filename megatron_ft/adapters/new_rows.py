"""The rows of added tokens in the embedding and the output layer, trained beside adapters while the other rows are frozen.

The rows of a table are one parameter, whole on every tensor-parallel rank. Hooks put them in the place of the frozen rows: into the
embedding's output at the positions of these tokens, and into their columns of the logits.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
import torch.distributed as dist
from megatron.core import parallel_state
from megatron.core.tensor_parallel import (
    copy_to_tensor_model_parallel_region,
    gather_from_sequence_parallel_region,
)
from megatron.core.transformer.utils import make_sharded_tensors_for_checkpoint
from torch import Tensor, nn

from megatron_ft.adapters.spec import EMBEDDING, OUTPUT, SUFFIX, rows_key
from megatron_ft.checkpoints.folder import MODEL_PREFIX


class NewRows(nn.Module):
    """Rows [n, h] of tokens. table: whose rows. is_copy: the last stage's, of tied embeddings; its gradients are added to the first's."""

    padded_rows: int = 0
    """Rows of the whole table, with padding."""

    def __init__(self, table: str, tokens: Sequence[int], config: Any, is_copy: bool = False):
        super().__init__()
        self.key, self.tokens, self.is_copy = rows_key(table), list(tokens), is_copy
        self.sequence_parallel, self.tp_size = config.sequence_parallel, config.tensor_model_parallel_size
        self.rows = nn.Parameter(torch.zeros(len(tokens), config.hidden_size, dtype=config.params_dtype))
        # Used on this rank's stretch of the sequence only; not counted twice in the norm.
        self.rows.sequence_parallel = config.sequence_parallel  # type: ignore[attr-defined]
        self.rows.shared = is_copy  # type: ignore[attr-defined]
        self.ids: Tensor
        self.register_buffer("ids", torch.tensor(self.tokens), persistent=False)
        self._own: dict[int, tuple[Tensor, Tensor]] = {}

    def into_embedding(self, ids: Tensor, output: Tensor) -> Tensor:
        """Return the embedding's output with these rows. ids [b, s]. output [b, s, h], or a stretch [s/tp, b, h]."""
        found = ids[..., None].eq(self.ids)
        if self.sequence_parallel:
            found = found.transpose(0, 1).chunk(self.tp_size)[parallel_state.get_tensor_model_parallel_rank()]
        return torch.where(found.any(-1, keepdim=True), found.to(self.rows.dtype) @ self.rows, output)

    def into_logits(self, hidden: Tensor, logits: Tensor) -> Tensor:
        """Return the logits [s, b, v/tp or v] with the columns of these tokens, in place. hidden: as the output layer gets it."""
        own = nn.functional.linear(hidden, self.rows)
        if self.sequence_parallel:
            own = gather_from_sequence_parallel_region(own, tensor_parallel_output_grad=True)
        else:
            own = copy_to_tensor_model_parallel_region(own)
        here, columns = self._columns(logits.shape[-1], logits.device)
        return logits.index_copy_(-1, columns, own.index_select(-1, here))

    def _columns(self, width: int, where: torch.device) -> tuple[Tensor, Tensor]:
        """Return which of the tokens this rank has, and their columns, of logits [.., width]."""
        if width not in self._own:
            whole = width >= self.padded_rows
            first = 0 if whole else parallel_state.get_tensor_model_parallel_rank() * width
            here = [n for n, token in enumerate(self.tokens) if first <= token < first + width]
            columns = [self.tokens[n] - first for n in here]
            self._own[width] = (
                torch.tensor(here, device=where, dtype=torch.long),
                torch.tensor(columns, device=where, dtype=torch.long),
            )
        return self._own[width]

    def sharded_state_dict(self, prefix: str = "", sharded_offsets: tuple = (), metadata: dict | None = None) -> dict:
        """Return the engine's description: a copy has the key of the first stage's rows."""
        (described,) = make_sharded_tensors_for_checkpoint(
            {"rows": self.rows}, MODEL_PREFIX + self.key.removesuffix("rows"), {}, sharded_offsets,
            tp_group=parallel_state.get_tensor_model_parallel_group(),
            dp_cp_group=parallel_state.get_data_parallel_group(with_context_parallel=True),
        ).values()  # fmt: skip
        if self.is_copy:
            described.replica_id = (1, *described.replica_id[1:])
        return {f"{prefix}rows": described}


def attach_new_rows(chunks: list, tokens: Sequence[int], tied: bool) -> None:
    """Add the rows to the chunks that have the embedding or the output layer."""
    for chunk in chunks:
        where, rows = next(chunk.parameters()).device, None
        if chunk.pre_process:
            rows = _made(EMBEDDING, tokens, chunk, where, False)
            chunk.embedding.add_module("word_embeddings" + SUFFIX, rows)
            chunk.embedding.word_embeddings.register_forward_hook(_at_embedding(rows))
        if chunk.post_process:
            if not tied or rows is None:
                rows = _made(EMBEDDING if tied else OUTPUT, tokens, chunk, where, tied)
                chunk.add_module("output_layer" + SUFFIX, rows)
            chunk.output_layer.register_forward_hook(_at_output(rows))


def _made(table: str, tokens: Sequence[int], chunk: Any, where: torch.device, is_copy: bool) -> NewRows:
    rows = NewRows(table, tokens, chunk.config, is_copy).to(where)
    rows.padded_rows = chunk.vocab_size
    return rows


def _at_embedding(rows: NewRows) -> Callable:
    return lambda _, args, output: rows.into_embedding(args[0], output)


def _at_output(rows: NewRows) -> Callable:
    return lambda _, args, output: (rows.into_logits(args[0], output[0]), *output[1:])


def new_rows_in(chunks: list) -> Iterator[tuple[Any, NewRows]]:
    """Yield (chunk, rows) of a stage."""
    for chunk in chunks:
        embedding = getattr(chunk, "embedding", None)
        for holder, name in ((embedding, "word_embeddings"), (chunk, "output_layer")):
            if (rows := getattr(holder, name + SUFFIX, None)) is not None:
                yield chunk, rows


@torch.no_grad()
def begin_as_frozen(chunks: list) -> None:
    """Set the rows to those of the frozen tables. All ranks of a tensor-parallel group call it."""
    for chunk, rows in new_rows_in(chunks):
        at_input = rows.key == rows_key(EMBEDDING) and not rows.is_copy
        table = chunk.embedding.word_embeddings.weight if at_input else chunk.output_layer.weight
        first = parallel_state.get_tensor_model_parallel_rank() * len(table)
        values = torch.zeros_like(rows.rows, dtype=torch.float32)
        for number, token in enumerate(rows.tokens):
            if first <= token < first + len(table):
                values[number] = table[token - first]
        dist.all_reduce(values, group=parallel_state.get_tensor_model_parallel_group())
        rows.rows.copy_(values)


def summing(chunks: list, tied: bool) -> Callable[[], None] | None:
    """Return what sums the gradients of tied rows over the first and the last stage, before data-parallel ranks reduce theirs.

    None: there is nothing to sum. chunks: bare ones, of a stage.
    """
    found = [rows for _, rows in new_rows_in(chunks)]
    if not (found and tied and parallel_state.get_pipeline_model_parallel_world_size() > 1):
        return None
    group = parallel_state.get_embedding_group()

    def sum_over_stages() -> None:
        for rows in found:
            dist.all_reduce(getattr(rows.rows, "main_grad"), group=group)  # noqa: B009 - the engine's wrapper adds it

    return sum_over_stages
