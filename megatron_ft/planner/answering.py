"""Memory of a rank that answers prompts or scores texts, without gradients, and the smallest layout whose ranks fit into a GPU."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

from megatron_ft.errors import ConfigError
from megatron_ft.models.architecture import Architecture, check_layout
from megatron_ft.models.families import family_of
from megatron_ft.models.pipeline import plain_split
from megatron_ft.models.quantised import check_blocks
from megatron_ft.planner.memory import RESERVE, parameters, quantised_parts
from megatron_ft.quantization.sizes import bits_in_memory

LOGITS = 2 * 2**28
"""Bytes of the largest piece of logits that is held at once, in fp32, and of its softmax."""


@dataclass(frozen=True)
class Reader:
    """A model that reads. width: bytes per number. tokens: of all rows of a batch, prompts and answers."""

    arch: Architecture
    width: int
    tokens: int
    nf4: bool = False

    def cache(self, tp: int, layers: int) -> int:
        """Return the bytes of keys and values of all tokens in so many layers of a rank."""
        groups = max(1, self.arch.num_query_groups // tp)
        return 2 * self.tokens * layers * groups * self.arch.head_dim * self.width

    def memory(self, tp: int, pp: int) -> int:
        """Return the bytes of the fullest rank."""
        split = plain_split(self.arch.num_layers, pp)
        return max(self._stage(tp, len(split.layers_of(number)), number == 0, number == pp - 1) for number in range(pp))

    def _stage(self, tp: int, layers: int, first: bool, last: bool) -> int:
        weights = parameters(self.arch, tp, layers, first, last) * self.width
        if self.nf4:
            weights -= round(layers * sum(quantised_parts(self.arch, tp)) * (self.width - bits_in_memory() / 8))
        return weights + self.cache(tp, layers) + self._working(tp) + LOGITS * last + int(RESERVE)

    def _working(self, tp: int) -> int:
        """Return the bytes of one layer's activations for all tokens: residual, norm, q, k, v and output, the MLP's two or three."""
        arch = self.arch
        attention = 2 * (arch.num_attention_heads + arch.num_query_groups) * arch.head_dim
        mlp = (3 if arch.gated else 2) * arch.ffn_hidden_size
        return self.tokens * (4 * arch.hidden_size + (attention + mlp) // tp) * self.width

    def divides(self, tp: int, pp: int) -> bool:
        """Say if the model can be split so."""
        try:
            check_layout(self.arch, tp, pp)
            if self.nf4:
                check_blocks(self.arch, family_of(self.arch).rules(self.arch), tp)
        except ConfigError:
            return False
        return True


def smallest_layout(
    readers: Iterable[Reader], counts: Iterable[int], gpus_per_node: int, memory: int, together: bool = False
) -> tuple[int, int] | None:
    """Return TP and PP of the fewest GPUs, of the given counts, into which every reader fits; of several the largest TP. None: none.

    memory: bytes of a GPU. Tensor parallelism stays within a node. together: all are in memory at once, else one after the other.
    """
    readers = list(readers)
    gather = sum if together else max
    for count in sorted(counts):
        for tp in (n for n in range(min(count, gpus_per_node), 0, -1) if count % n == 0):
            pp = count // tp
            if all(one.divides(tp, pp) for one in readers) and gather(one.memory(tp, pp) for one in readers) <= memory:
                return tp, pp
    return None
