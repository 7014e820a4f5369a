"""Rules that several families share. A family adds Hugging Face's names of the tensors.

All follow the order of megatron-core's modules. A norm before a linear has another name in torch_dist (Rule.dist_key).
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from megatron_ft.models.architecture import Architecture
from megatron_ft.models.weights import (
    Cut,
    Rule,
    Shape,
    halve_rows,
    merge_qkv,
    qkv_rows,
    split_experts,
    split_qkv,
    stack_experts,
    stack_rows,
)

LAYER = "decoder.layers.{n}."


def embedding(hf_key: str) -> Rule:
    return _vocabulary("embedding.word_embeddings.weight", hf_key, "first")


def output_layer(hf_key: str = "lm_head.weight") -> Rule:
    return _vocabulary("output_layer.weight", hf_key, "last")


def final_norm(arch: Architecture, hf_name: str) -> list[Rule]:
    return _norm(arch, "decoder.final_layernorm", hf_name, stage="last")


def input_norm(arch: Architecture, hf_name: str) -> list[Rule]:
    """Return the norm before attention; if it is shared, it is also before the MLP."""
    return _norm(arch, LAYER + "input_layernorm", hf_name, LAYER + "self_attention.linear_qkv.layer_norm_")


def mlp_norm(arch: Architecture, hf_name: str) -> list[Rule]:
    return _norm(arch, LAYER + "pre_mlp_layernorm", hf_name, LAYER + "mlp.linear_fc1.layer_norm_")


def head_norms(hf_query: str, hf_key: str) -> list[Rule]:
    """Return the norms of query and key heads, [d] each."""
    names = (("q_layernorm", hf_query), ("k_layernorm", hf_key))
    return [same(LAYER + f"self_attention.{ours}.weight", hf, lambda a: (a.head_dim,)) for ours, hf in names]


def separate_qkv(hf_keys: tuple[str, str, str], kind: str = "weight") -> Rule:
    """Return the rule for q, k and v that are separate in Hugging Face and one matrix (or bias) in megatron-core."""
    rest = (lambda a: (a.hidden_size,)) if kind == "weight" else (lambda a: ())
    return Rule(
        LAYER + f"self_attention.linear_qkv.{kind}",
        hf_keys,
        hf_shapes=lambda a: [(rows, *rest(a)) for rows in qkv_rows(a)],
        full_shape=lambda a: (sum(qkv_rows(a)), *rest(a)),
        cut="column_parallel",
        to_megatron=merge_qkv,
        to_hf=split_qkv,
    )


def fused_qkv(hf_key: str) -> Rule:
    """Return the rule for a matrix that is [q_1..q_n, k, v] for each query group on both sides."""
    name = LAYER + "self_attention.linear_qkv.weight"
    return same(name, hf_key, lambda a: (sum(qkv_rows(a)), a.hidden_size), cut="column_parallel")


def attention_output(hf_key: str) -> Rule:
    name = LAYER + "self_attention.linear_proj.weight"
    return same(name, hf_key, lambda a: (a.hidden_size, qkv_rows(a)[0]), cut="row_parallel")


def gated_mlp(hf_gate: str, hf_up: str, hf_down: str) -> list[Rule]:
    """Of layers without experts."""
    first = Rule(
        LAYER + "mlp.linear_fc1.weight",
        (hf_gate, hf_up),
        hf_shapes=lambda a: [(a.ffn_hidden_size, a.hidden_size)] * 2,
        full_shape=lambda a: (2 * a.ffn_hidden_size, a.hidden_size),
        cut="gated_column_parallel",
        mlp="dense",
        to_megatron=stack_rows,
        to_hf=halve_rows,
    )
    return [first, _down(hf_down)]


def plain_mlp(hf_up: str, hf_down: str) -> list[Rule]:
    """As gated_mlp."""
    up = same(
        LAYER + "mlp.linear_fc1.weight", hf_up, lambda a: (a.ffn_hidden_size, a.hidden_size), cut="column_parallel", mlp="dense"
    )  # fmt: skip
    return [up, _down(hf_down)]


def router(hf_key: str) -> Rule:
    """Return the rule for the router, which chooses the experts of a token."""
    return same(LAYER + "mlp.router.weight", hf_key, lambda a: (a.num_experts, a.hidden_size), mlp="experts")


def gated_experts(arch: Architecture, hf_gate: str, hf_up: str, hf_down: str) -> list[Rule]:
    """Return the rules for gated MLPs of layers with experts. Each expert has its own tensors in Hugging Face; `{e}` in a key is its
    number.
    """
    return [
        _experts(
            arch, "linear_fc1", (hf_gate, hf_up), lambda a: (a.expert_ffn_hidden_size, a.hidden_size), "gated_column_parallel"
        ),
        _experts(arch, "linear_fc2", (hf_down,), lambda a: (a.hidden_size, a.expert_ffn_hidden_size), "row_parallel"),
    ]  # fmt: skip


def same(key: str, hf_key: str, shape: Callable[[Architecture], Shape], **others: Any) -> Rule:
    """Return the rule for a tensor that is the same on both sides. shape: Architecture -> Shape."""
    return Rule(key, (hf_key,), hf_shapes=lambda a: [shape(a)], full_shape=shape, **others)


def _down(hf_key: str) -> Rule:
    return same(
        LAYER + "mlp.linear_fc2.weight", hf_key, lambda a: (a.hidden_size, a.ffn_hidden_size), cut="row_parallel", mlp="dense"
    )  # fmt: skip


def _experts(
    arch: Architecture, name: str, hf_keys: tuple[str, ...], shape: Callable[[Architecture], Shape], cut: Cut
) -> Rule:
    """shape: of one matrix in Hugging Face, of which one expert has as many as there are hf_keys."""
    each = len(hf_keys)

    def full_shape(a: Architecture) -> Shape:
        rows, columns = shape(a)
        return a.num_experts, each * rows, columns

    return Rule(
        LAYER + f"mlp.experts.{name}.weight",
        tuple(key.replace("{e}", str(expert)) for expert in range(arch.num_experts) for key in hf_keys),
        hf_shapes=lambda a: [shape(a)] * each * a.num_experts,
        full_shape=full_shape,
        cut=cut,
        has_experts=True,
        mlp="experts",
        dist_key=LAYER + f"mlp.experts.experts.{name}.weight",
        to_megatron=stack_experts,
        to_hf=lambda a, full: split_experts(a, full, each),
    )


def _norm(arch: Architecture, name: str, hf_name: str, dist: str | None = None, stage: str = "layer") -> list[Rule]:
    kinds = ("weight", "bias") if arch.norm == "layernorm" else ("weight",)
    return [
        same(f"{name}.{kind}", f"{hf_name}.{kind}", _hidden, dist_key=dist and dist + kind, stage=stage)
        for kind in kinds
    ]


def _vocabulary(key: str, hf_key: str, stage: str) -> Rule:
    return same(key, hf_key, lambda a: (a.vocab_size, a.hidden_size), cut="vocab_parallel", stage=stage)


def _hidden(arch: Architecture) -> Shape:
    return (arch.hidden_size,)
