"""The correspondence of weights, as data: one Rule maps a megatron-core tensor to its Hugging Face tensors, in both directions.

A rule also states how tensor parallelism cuts the megatron tensor and which pipeline stage holds it, so conversion, resharding and plans
are loops over rules. It opens no files, and torch is imported only when tensors are changed, so that shapes are available without it.

Norms are separate modules (megatron-core's local layer spec), not fused into the linear that follows them.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal

from megatron_ft.models.architecture import Architecture

if TYPE_CHECKING:
    from torch import Tensor

Shape = tuple[int, ...]
Cut = Literal["replicated", "column_parallel", "row_parallel", "gated_column_parallel", "vocab_parallel"]
"""How ranks share a tensor, in Megatron's terms for a weight [out, in]. replicated: whole on each rank. column_parallel: axis 0 is cut.
row_parallel: axis 1. gated_column_parallel: gate and up are each cut by axis 0, a rank holds [gate; up]. vocab_parallel: axis 0, after
padding."""


@dataclass(frozen=True)
class Rule:
    """One megatron-core tensor and its Hugging Face tensors. `{n}` in a key is the layer's number, global, from 0."""

    key: str
    hf_keys: tuple[str, ...]
    hf_shapes: Callable[[Architecture], list[Shape]]
    full_shape: Callable[[Architecture], Shape]
    """Of the whole tensor, without vocabulary padding."""
    cut: Cut = "replicated"
    has_experts: bool = False
    """The whole tensor is [experts, ...]: expert-parallel ranks hold consecutive experts, and `cut` is of one expert's matrix.
    A module has a parameter for each expert, `key` with .local_experts.NUMBER after .experts."""
    mlp: Literal["dense", "experts"] | None = None
    """Layers that have the tensor: those whose MLP is dense, those with experts; None: all."""
    stage: Literal["first", "layer", "last"] = "layer"
    dist_key: str | None = None
    """Name in a torch_dist checkpoint where it differs: megatron-core stores a norm as if it were fused into the linear
    that follows it, so that models with and without Transformer Engine read the same checkpoint."""
    to_megatron: Callable[[Architecture, Sequence[Tensor]], Tensor] = lambda arch, tensors: tensors[0]
    to_hf: Callable[[Architecture, Tensor], list[Tensor]] = lambda arch, full: [full]

    def is_in(self, arch: Architecture, layer: int) -> bool:
        """Return whether a layer, counted from 0, has the tensor."""
        return self.mlp is None or (self.mlp == "experts") == arch.has_experts(layer)

    @property
    def _axis(self) -> int:
        """The axis that tensor parallelism cuts."""
        return int(self.has_experts) + (self.cut == "row_parallel")

    def part_shape(self, arch: Architecture, tp_size: int, padded_vocab: int, ep_size: int = 1) -> Shape:
        """Return the shape of one rank's part. ep_size: ranks that share the experts."""
        shape = list(self.full_shape(arch))
        if self.cut == "vocab_parallel":
            shape[0] = padded_vocab
        if self.cut != "replicated":
            shape[self._axis] //= tp_size
        if self.has_experts:
            shape[0] //= ep_size
        return tuple(shape)

    def part(self, full: Tensor, tp_size: int, tp_rank: int, ep_size: int = 1, ep_rank: int = 0) -> Tensor:
        """Return the part of tensor-parallel rank tp_rank, and of the experts those of rank ep_rank of ep_size: a view where the part is
        contiguous in one axis, [gate; up] a copy.

        A vocab_parallel tensor must already be padded (pad_rows).
        """
        if self.has_experts:
            full = full.chunk(ep_size)[ep_rank]
        if self.cut == "replicated":
            return full
        if self.cut == "gated_column_parallel":
            import torch

            halves = full.chunk(2, dim=self._axis)
            return torch.cat([half.chunk(tp_size, dim=self._axis)[tp_rank] for half in halves], dim=self._axis)
        return full.chunk(tp_size, dim=self._axis)[tp_rank]

    def split(self, arch: Architecture, full: Tensor, tp_size: int, padded_vocab: int | None = None) -> list[Tensor]:
        """Return all tensor-parallel ranks' parts, with all experts. `padded_vocab`: rows to pad a vocab_parallel tensor to with zeros;
        default: already padded.
        """
        if self.cut == "vocab_parallel" and padded_vocab is not None:
            full = pad_rows(full, padded_vocab)
        return [self.part(full, tp_size, rank) for rank in range(tp_size)]

    def join(self, arch: Architecture, parts: Sequence[Tensor]) -> Tensor:
        """Return the whole tensor, padding rows dropped: the inverse of split."""
        import torch

        if self.cut == "replicated":
            return parts[0]
        if self.cut == "gated_column_parallel":
            halves = [part.chunk(2, dim=self._axis) for part in parts]
            return torch.cat([gate for gate, _ in halves] + [up for _, up in halves], dim=self._axis)
        full = torch.cat(list(parts), dim=self._axis)
        return full[: arch.vocab_size] if self.cut == "vocab_parallel" else full


@dataclass(frozen=True)
class Placed:
    """A rule applied to one layer (or to the embedding or head), as one pipeline stage sees it."""

    rule: Rule
    key: str
    """With the GLOBAL layer number."""
    dist_key: str
    """The name in a torch_dist checkpoint, after its prefix; layer number global too."""
    local_key: str
    """With the stage's own layer number: the name in a rank's module and in its classic file."""
    hf_keys: tuple[str, ...]
    is_copy: bool = False
    """The last stage's copy of tied embeddings: the same numbers lie on the first stage."""

    def parameters(self, part: Tensor) -> Iterator[tuple[str, Tensor]]:
        """Yield (name, values) of the parameters of a rank's module that hold a part: one, or one for each of its experts."""
        if not self.rule.has_experts:
            yield self.local_key, part
            return
        before, after = self.local_key.split(".experts.")
        for number, values in enumerate(part):
            yield f"{before}.experts.local_experts.{number}.{after}", values


def pad_rows(tensor: Tensor, rows: int) -> Tensor:
    """Return [v, h] as [rows, h] with zeros below; the tensor itself if it has that many rows."""
    if tensor.shape[0] == rows:
        return tensor
    padded = tensor.new_zeros((rows, *tensor.shape[1:]))
    padded[: tensor.shape[0]] = tensor
    return padded


def placed_rules(arch: Architecture, rules: Sequence[Rule], pp_size: int = 1, pp_rank: int = 0) -> Iterator[Placed]:
    """Yield what stage pp_rank holds, in the order of the forward pass. With the defaults: the whole model."""
    if pp_rank == 0:
        yield from (_place(rule) for rule in rules if rule.stage == "first")
    for local, layer in enumerate(layers_of_stage(arch.num_layers, pp_size, pp_rank)):
        here = (rule for rule in rules if rule.stage == "layer" and rule.is_in(arch, layer))
        yield from (_place(rule, layer, local) for rule in here)
    if pp_rank == pp_size - 1:
        yield from (_place(rule) for rule in rules if rule.stage == "last")
        if arch.tied_embeddings and pp_size > 1:
            yield from (
                Placed(rule, rule.key, rule.key, "output_layer.weight", rule.hf_keys, is_copy=True)
                for rule in rules
                if rule.cut == "vocab_parallel"
            )


def _place(rule: Rule, layer: int = 0, local: int = 0) -> Placed:
    return Placed(
        rule,
        rule.key.format(n=layer),
        (rule.dist_key or rule.key).format(n=layer),
        rule.key.format(n=local),
        tuple(key.format(n=layer) for key in rule.hf_keys),
    )


# Shapes and bodies that several families share.


def qkv_rows(arch: Architecture) -> tuple[int, int, int]:
    """Return the rows of q, k and v."""
    key_value = arch.num_query_groups * arch.head_dim
    return arch.num_attention_heads * arch.head_dim, key_value, key_value


def merge_qkv(arch: Architecture, tensors: Sequence[Tensor]) -> Tensor:
    """Return q, k, v as rows [q_1..q_n, k, v] per query group, n = heads / groups, so that the rows of a rank are whole groups.

    Weights [rows, h] or biases [rows].
    """
    import torch

    rest = tensors[0].shape[1:]
    return torch.cat([t.reshape(arch.num_query_groups, -1, *rest) for t in tensors], dim=1).reshape(-1, *rest)


def split_qkv(arch: Architecture, full: Tensor) -> list[Tensor]:
    """Return the inverse of merge_qkv."""
    queries = arch.num_attention_heads // arch.num_query_groups * arch.head_dim
    grouped = full.reshape(arch.num_query_groups, -1, *full.shape[1:])
    parts = grouped.split([queries, arch.head_dim, arch.head_dim], dim=1)
    return [part.reshape(-1, *full.shape[1:]) for part in parts]


def stack_rows(arch: Architecture, tensors: Sequence[Tensor]) -> Tensor:
    """Return gate [f, h], up [f, h] as [gate; up] [2f, h]."""
    import torch

    return torch.cat(list(tensors))


def halve_rows(arch: Architecture, full: Tensor) -> list[Tensor]:
    """Return the inverse of stack_rows."""
    return list(full.chunk(2))


def stack_experts(arch: Architecture, tensors: Sequence[Tensor]) -> Tensor:
    """The matrices of expert 0, of expert 1, ... -> [experts, rows, columns], where an expert's matrices lie below each other."""
    import torch

    return torch.cat(list(tensors)).reshape(arch.num_experts, -1, tensors[0].shape[1])


def split_experts(arch: Architecture, full: Tensor, each: int) -> list[Tensor]:
    """Inverse of stack_experts. each: matrices of one expert."""
    return [matrix for expert in full for matrix in expert.chunk(each)]


def layers_of_stage(num_layers: int, pp_size: int, pp_rank: int) -> range:
    """Return the global numbers (from 0) of the layers of a stage. num_layers is a multiple of pp_size (see check_layout)."""
    per_stage = num_layers // pp_size
    return range(pp_rank * per_stage, (pp_rank + 1) * per_stage)
