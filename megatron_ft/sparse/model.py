"""Turns a loaded model of the engine, of one process, into one that decodes with `Rows`."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from megatron_ft import device
from megatron_ft.errors import ConfigError
from megatron_ft.models.architecture import Architecture, refuse_experts
from megatron_ft.models.fingerprint import digest, sums
from megatron_ft.sparse.mlp import ACTIVATIONS, Counts, How, Mode, RowsLinear, SparseMlp
from megatron_ft.sparse.predictors import Predictor, Thin
from megatron_ft.sparse.rows import Precision, Rows


def check_sparse(arch: Architecture) -> None:
    """Raise ConfigError for a model whose activations are never zero, and where there is no CPU to decode on."""
    if arch.activation not in ACTIVATIONS:
        raise ConfigError(
            f"sparse decoding needs activations that are zero ({', '.join(ACTIVATIONS)}), the model has {arch.activation}: "
            f"swap and train it first, or leave out --sparse"
        )
    refuse_experts(arch)
    if device.has_gpu():
        raise ConfigError("sparse decoding runs on a CPU, and this process uses a GPU: set MEGATRON_FT_DEVICE=cpu")


def first_matrix(mlp: Any, arch: Architecture) -> Tensor:
    """Return the part of an MLP's first linear that decides what is zero, [ffn, hidden]: the gate, or all of it."""
    return mlp.linear_fc1.weight.detach()[: arch.ffn_hidden_size]


def firsts_digest(model: Any, arch: Architecture) -> dict[str, str]:
    """Return a hash of what predictors predict, by type, for predictors to be bound to."""
    found: dict[str, dict[str, int]] = {}
    for number, layer in enumerate(model.decoder.layers):
        for kind, total in sums(first_matrix(layer.mlp, arch)).items():
            found.setdefault(kind, {})[f"layer {number}"] = total
    return {kind: digest(totals) for kind, totals in found.items()}


@dataclass
class SparseModel:
    """The converted layers of a model, in order."""

    mlps: list[SparseMlp]
    linears: list[RowsLinear]
    how: How

    @property
    def mode(self) -> Mode:
        return self.how.mode

    @mode.setter
    def mode(self, mode: Mode) -> None:
        self.how.mode = mode
        for mlp in self.mlps:
            mlp.counts = Counts()

    def predict_with(self, layers: list[Thin], precision: Precision) -> None:
        """Take predictors, one for each layer."""
        for mlp, thin in zip(self.mlps, layers, strict=True):
            mlp.predictor = Predictor(thin, precision)

    @property
    def zeros(self) -> float:
        """Return the share of activations that were zero since the mode was set, of tokens read one by one."""
        total = sum(mlp.counts.tokens * mlp.first.rows for mlp in self.mlps)
        return 1 - sum(mlp.counts.active for mlp in self.mlps) / max(1, total)

    @property
    def computed(self) -> float:
        """Return the share of rows of the first matrix that were read."""
        total = sum(mlp.counts.tokens * mlp.first.rows for mlp in self.mlps)
        return sum(mlp.counts.computed for mlp in self.mlps) / max(1, total)

    def bytes_per_token(self, mode: Mode) -> float:
        """Return the bytes of weights that a token read, with the activations counted since the mode was set."""
        rest = sum(one.matrix.rows * one.matrix.row_bytes for one in self.linears)
        return rest + sum(mlp.read_bytes(mode) for mlp in self.mlps)


@torch.no_grad()
def make_sparse(model: Any, arch: Architecture, precision: Precision, mode: Mode = "exact") -> SparseModel:
    """Convert a model in place; what is no matrix computes in fp32 from then on. Raise ConfigError for a model that cannot be."""
    check_sparse(arch)
    how = How(mode)
    found = SparseModel([], [], how)
    head = model.embedding.word_embeddings.weight if arch.tied_embeddings else model.output_layer.weight
    model.output_layer = RowsLinear(Rows.of(head, precision))
    for layer in model.decoder.layers:
        attention = layer.self_attention
        for name in ("linear_qkv", "linear_proj"):
            linear = getattr(attention, name)
            bias = getattr(linear, "bias", None)
            made = RowsLinear(Rows.of(linear.weight, precision), None if bias is None else bias.detach().float())
            setattr(attention, name, made)
            found.linears.append(made)
        layer.mlp = _sparse_mlp(layer.mlp, arch, precision, how)
        found.mlps.append(layer.mlp)
    found.linears.append(model.output_layer)
    _compute_in_fp32(model)
    return found


def _sparse_mlp(mlp: Any, arch: Architecture, precision: Precision, how: How) -> SparseMlp:
    first = Rows.of(first_matrix(mlp, arch), precision)
    up = Rows.of(mlp.linear_fc1.weight.detach()[arch.ffn_hidden_size :], precision) if arch.gated else None
    down = Rows.of(mlp.linear_fc2.weight.detach().t(), precision)
    return SparseMlp(first, up, down, arch.activation, how)


def _compute_in_fp32(model: Any) -> None:
    """Convert norms and embeddings, which are small, and what the engine allocates."""
    model.float()
    model.rotary_pos_emb.dtype = torch.float32
    for config in {
        id(module.config): module.config for module in model.modules() if hasattr(module, "config")
    }.values():
        config.params_dtype = config.pipeline_dtype = torch.float32
        config.bf16 = config.fp16 = False


def same_model(recorded: Mapping[str, str], found: Mapping[str, str]) -> bool:
    """Return whether hashes agree in every type that both have."""
    common = recorded.keys() & found.keys()
    return bool(common) and all(recorded[kind] == found[kind] for kind in common)
