"""Builds megatron-core's GPTModel: from an Architecture and a Layout it returns this rank's part of the model.

No other module does. The layer spec is the engine's local one with our norm and core attention. Data, optimizers and files are in other
modules.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable
from typing import Any

import torch
from megatron.core.models.gpt.gpt_layer_specs import get_gpt_layer_local_spec
from megatron.core.models.gpt.gpt_model import GPTModel
from megatron.core.transformer.identity_op import IdentityOp
from megatron.core.transformer.spec_utils import ModuleSpec
from megatron.core.transformer.transformer_block import TransformerBlockSubmodules, get_num_layers_to_build
from megatron.core.transformer.transformer_config import TransformerConfig
from megatron.core.transformer.transformer_layer import get_transformer_layer_offset
from torch.nn import functional

from megatron_ft import device
from megatron_ft.engine.parallel import Layout
from megatron_ft.errors import ConfigError
from megatron_ft.models.architecture import Architecture, check_layout, padded_vocab_size
from megatron_ft.models.attention import SdpaAttention
from megatron_ft.models.cross_entropy import vocab_parallel_cross_entropy
from megatron_ft.models.dropout import RowDropout, RowLayer
from megatron_ft.models.gated import Gated, relu2
from megatron_ft.models.kernels import Attention, Choice
from megatron_ft.models.norms import NORMS
from megatron_ft.models.parallel_block import ParallelBlock
from megatron_ft.models.parts import Layer
from megatron_ft.models.pipeline import PipelineSplit, plain_split
from megatron_ft.models.rope import attention_factor
from megatron_ft.models.rotary import Rotary, ropes_of, turn_by_table
from megatron_ft.quantization.frozen import frozen_linears, mlp_submodules, plan_frozen

_PLAIN = {"silu": functional.silu, "gelu": functional.gelu, "relu": functional.relu, "relu2": relu2}
_GATED = {"swiglu": functional.silu, "geglu": functional.gelu, "reglu": functional.relu, "relu2glu": relu2}
ACTIVATIONS = {**_PLAIN, **_GATED}
"""Architecture.activation -> function. Which are gated: Architecture.gated."""


class ChatModel(GPTModel):
    """GPTModel whose padded vocabulary rows take no part in the loss.

    The number of padding rows depends on the tensor-parallel size; left in the softmax, the loss would depend on it too.
    """

    true_vocab_size: int
    fused: bool = False
    """whether the loss is computed by compiled kernels"""
    loss_of: Callable[..., torch.Tensor] | None = None
    """the loss of this forward pass; None: cross entropy"""

    def forward(
        self, *args: Any, packed_seq_params: Any = None, loss_of: Callable[..., torch.Tensor] | None = None, **options: Any
    ) -> torch.Tensor:  # fmt: skip
        """Return what the engine's model does. loss_of: (logits [s, b, v/tp], labels [s, b], vocab_size, group) -> losses [.., s, b], in
        place of cross entropy.
        """
        if self.pre_process:
            self.embedding.embedding_dropout.keys = getattr(packed_seq_params, "keys", None)
        self.rotary_pos_emb.positions = getattr(packed_seq_params, "positions", None)
        self.loss_of = loss_of
        try:
            return super().forward(*args, packed_seq_params=packed_seq_params, **options)
        finally:
            self.loss_of = None  # it may hold a teacher's logits

    def compute_language_model_loss(self, labels: torch.Tensor, logits: torch.Tensor) -> torch.Tensor:
        """Return the loss per token [b, s], or what `loss_of` returns. Labels [b, s], logits [s, b, v/tp]."""
        by_position, size, group = labels.transpose(0, 1), self.true_vocab_size, self.pg_collection.tp
        if self.loss_of is not None:
            return self.loss_of(logits, by_position, size, group)
        losses = vocab_parallel_cross_entropy(logits, by_position, size, group, self.fused)
        return losses.transpose(0, 1).contiguous()


@dataclasses.dataclass(frozen=True)
class BuildOptions:
    """Settings of training about a model that its checkpoint does not contain."""

    dtype: torch.dtype = torch.float32
    hidden_dropout: float = 0.0
    attention_dropout: float = 0.0
    lima_dropout: bool = False
    recompute_granularity: str | None = None
    recompute_method: str | None = None
    recompute_num_layers: int | None = None
    recompute_modules: tuple[str, ...] = ()
    max_sequence_length: int | None = None
    variable_seq_lengths: bool = False
    """rows differ in length between microbatches, so pipeline stages exchange the shapes first"""
    padded_vocab_size: int | None = None
    """rows of the embedding; default: Megatron's rule for this tensor-parallel size"""
    overlap_p2p: bool = False
    """exchange activations between interleaved stages while computing"""
    kernels: Choice | None = None
    """default: torch's operations, none of them compiled"""
    split: PipelineSplit | None = None
    """layers of each stage; default: evenly"""
    nf4: torch.dtype | None = None
    """linears hold NF4 and are frozen; the type is that of their dequantised weights"""


def transformer_config(arch: Architecture, layout: Layout, options: BuildOptions) -> TransformerConfig:
    """Return the engine's configuration for this model and layout."""
    split, fused = options.split, bool(options.kernels and options.kernels.fused)
    return TransformerConfig(
        num_layers=arch.num_layers,
        hidden_size=arch.hidden_size,
        ffn_hidden_size=arch.ffn_hidden_size,
        num_attention_heads=arch.num_attention_heads,
        num_query_groups=arch.num_query_groups,
        kv_channels=arch.head_dim,
        normalization=NORMS[arch.norm][0],
        layernorm_epsilon=arch.norm_epsilon,
        activation_func=ACTIVATIONS[arch.activation],
        gated_linear_unit=arch.gated,
        add_bias_linear=False,
        add_qkv_bias=arch.qkv_bias,
        qk_layernorm=arch.qk_norm,
        softmax_scale=_softmax_scale(arch),
        **_window(arch),
        **_experts(arch, layout),
        hidden_dropout=options.hidden_dropout,
        attention_dropout=options.attention_dropout,
        tensor_model_parallel_size=layout.tp_size,
        pipeline_model_parallel_size=layout.pp_size,
        virtual_pipeline_model_parallel_size=layout.vp_size if layout.vp_size > 1 else None,
        pipeline_model_parallel_layout=split.for_engine() if split and not split.is_plain else None,
        context_parallel_size=layout.cp_size,
        sequence_parallel=layout.sequence_parallel,
        params_dtype=options.dtype,
        pipeline_dtype=options.dtype,
        bf16=options.dtype == torch.bfloat16,
        fp16=options.dtype == torch.float16,
        recompute_granularity=options.recompute_granularity,
        recompute_method=options.recompute_method,
        recompute_num_layers=options.recompute_num_layers,
        recompute_modules=list(options.recompute_modules) or None,
        calculate_per_token_loss=True,
        # Weights always come from a checkpoint. Initialisation stays on, doing nothing, because it is also what marks parameters as
        # split over ranks; unmarked ones are left out of the gradient norm.
        init_method=_leave,
        output_layer_init_method=_leave,
        embedding_init_method=_leave,
        gradient_accumulation_fusion=bool(options.kernels and options.kernels.accumulates),
        masked_softmax_fusion=False,
        # The engine's kernel for GeGLU computes the tanh approximation of GELU, not GELU.
        bias_activation_fusion=fused and arch.activation == "swiglu",
        bias_dropout_fusion=False,
        apply_rope_fusion=False,
        persist_layer_norm=False,
        deallocate_pipeline_outputs=True,
        variable_seq_lengths=options.variable_seq_lengths,
        moe_token_dispatcher_type="alltoall",  # the engine's default refuses variable lengths, also without experts
        overlap_p2p_comm=options.overlap_p2p,
        batch_p2p_comm=_batches_exchanges(layout, options),
        batch_p2p_sync=False,  # a wait for the whole device after every exchange; needed by torch before 1.13 only
    )


def _batches_exchanges(layout: Layout, options: BuildOptions) -> bool:
    """Return whether a stage's sends and receives go to NCCL as one group.

    Sends and receives between the same two processes are matched in the order in which they are posted. With two interleaved
    stages the previous and the next stage are the same process, which posts "to previous, from previous, to next, from next": the
    two processes' orders do not match, and activations arrive as gradients. Posted one by one, the engine takes a group for each
    direction. Over gloo they are always posted one by one.
    """
    same_neighbour = layout.pp_size == 2 and layout.vp_size > 1
    return device.has_gpu() and not options.overlap_p2p and not same_neighbour


def attention_needs(arch: Architecture) -> Attention:
    """Return what the model asks of an attention kernel."""
    return Attention(
        grouped=arch.num_query_groups != arch.num_attention_heads,
        window=arch.sliding_window is not None,
        scaled=_softmax_scale(arch) is not None,
    )


def _softmax_scale(arch: Architecture) -> float | None:
    """Return None for the engine's 1 / sqrt(head_dim), else that times m^2 for a RoPE that scales queries and keys by m."""
    m = attention_factor(arch.rope_scaling, arch.max_position_embeddings)
    if m != 1.0 and arch.window_rope_theta is not None:
        raise ConfigError(
            f"rope scaling {arch.rope_scaling} scales attention in some layers only (those without the window have a rotary "
            f"embedding of their own), which the engine cannot do: use another method with --rope_scaling_type"
        )
    return None if m == 1.0 else m * m / math.sqrt(arch.head_dim)


def _window(arch: Architecture) -> dict:
    """Return the window for the engine, which counts the keys to the left of a token; a list states which layers have it."""
    if arch.sliding_window is None:
        return {}
    has = [int(arch.has_window(layer)) for layer in range(arch.num_layers)]
    return {"window_size": (arch.sliding_window - 1, 0), "window_attn_skip_freq": has}


def _experts(arch: Architecture, layout: Layout) -> dict:
    """Return the engine's settings for experts (moe_...). The router computes in fp32; there is no load-balancing loss."""
    if not arch.num_experts:
        return {}
    return {
        "num_moe_experts": arch.num_experts,
        "moe_layer_freq": [int(arch.has_experts(layer)) for layer in range(arch.num_layers)],
        "moe_ffn_hidden_size": arch.expert_ffn_hidden_size,
        "moe_router_topk": arch.experts_per_token,
        # Softmax over the chosen experts is softmax over all, divided by the sum over the chosen.
        "moe_router_pre_softmax": not arch.experts_renormalised,
        "moe_router_dtype": "fp32",
        "moe_router_load_balancing_type": "none",
        "expert_model_parallel_size": layout.ep_size,
    }


def _leave(weight: torch.Tensor) -> None:
    """Do nothing, as the initialisation of a weight."""


def build_model(arch: Architecture, layout: Layout, options: BuildOptions = BuildOptions()) -> ChatModel:
    """Return this rank's stage and slice, on its device, with weights not filled; for layouts of one chunk per stage.

    Raise ConfigError if the layout does not divide the model.
    """
    (model,) = build_chunks(arch, layout, options)
    return model


def build_chunks(arch: Architecture, layout: Layout, options: BuildOptions) -> list[ChatModel]:
    """Return this rank's slice of every chunk of its stage, in order; all share one config, as the engine's schedules expect."""
    split = options.split or plain_split(arch.num_layers, layout.pp_size)
    assert (split.stages, split.virtual_size) == (layout.pp_size, layout.vp_size), "the split is of another layout"
    check_layout(arch, layout.tp_size, expert_model_parallel_size=layout.ep_size)
    config = transformer_config(arch, layout, options)
    # Not passed to the constructor, which would require Transformer Engine; `turn` reads it.
    config.apply_rope_fusion = bool(options.kernels and options.kernels.fused)
    # Nor this, for which it takes Transformer Engine's functions only: the MLP's activation is the module in its specification.
    config.use_te_activation_func = _is_own_activation(config)
    turn_by_table()
    return [_chunk(arch, layout, options, config, number) for number in range(layout.vp_size)]


def _is_own_activation(config: TransformerConfig) -> bool:
    """Return whether the activation is `Gated`: not that of experts, which also takes weights, and not where it is one compiled kernel."""
    return config.gated_linear_unit and not config.num_moe_experts and not config.bias_activation_fusion


def _chunk(
    arch: Architecture, layout: Layout, options: BuildOptions, config: TransformerConfig, number: int
) -> ChatModel:
    first, last = number == 0, number == layout.vp_size - 1
    model = ChatModel(
        config=config,
        transformer_layer_spec=_block_spec(arch, config, options, number if layout.vp_size > 1 else None),
        vocab_size=options.padded_vocab_size or padded_vocab_size(arch.vocab_size, layout.tp_size),
        max_sequence_length=options.max_sequence_length or arch.max_position_embeddings,
        pre_process=layout.is_first_stage and first,
        post_process=layout.is_last_stage and last,
        parallel_output=True,
        share_embeddings_and_output_weights=arch.tied_embeddings,
        position_embedding_type="rope",
        rotary_base=arch.rope_theta,
        vp_stage=number if layout.vp_size > 1 else None,
    )
    model.true_vocab_size, model.fused = arch.vocab_size, bool(options.kernels and options.kernels.fused)
    model.rotary_pos_emb = Rotary(arch, options.dtype, options.max_sequence_length or 0, model.rotary_pos_emb.cp_group)
    if model.pre_process:
        model.embedding.embedding_dropout = RowDropout(options.hidden_dropout)
    if options.lima_dropout:
        apply_lima_dropout(model, options.hidden_dropout, arch.num_layers)
    if options.nf4 is not None:
        for linear in frozen_linears(model).values():
            linear.rounded = options.nf4
    return model.to(device.current_device())


def apply_lima_dropout(model: ChatModel, hidden_dropout: float, num_layers: int) -> None:
    """Set residual dropout that rises from 0 at the first layer to `hidden_dropout` at the last; none on the embedding (LIMA, 2023).

    Layers are counted over the whole model, whatever the pipeline split. A one-layer model gets none.
    """
    for layer in model.decoder.layers:
        layer.hidden_dropout = hidden_dropout * (layer.layer_number - 1) / max(1, num_layers - 1)
    if model.pre_process:
        model.embedding.embedding_dropout.p = 0.0


def _block_spec(
    arch: Architecture, config: TransformerConfig, options: BuildOptions, vp_stage: int | None
) -> TransformerBlockSubmodules:
    layers, offset = get_num_layers_to_build(config, vp_stage), get_transformer_layer_offset(config, vp_stage)
    parts = [arch.layer(offset + number) for number in range(layers)]
    ropes = ropes_of(arch)
    kernels = options.kernels
    made = [_layer_spec(layer, config, kernels, (ropes.index(layer.attention.rope), len(ropes))) for layer in parts]
    if options.nf4 is not None:
        for layer in made:
            plan_frozen(layer)
    return TransformerBlockSubmodules(layer_specs=made, layer_norm=NORMS[arch.norm][1])


def _layer_spec(
    parts: Layer, config: TransformerConfig, kernels: Choice | None, rope: tuple[int, int]
) -> ModuleSpec:  # fmt: skip
    """Return the specification of a layer. rope: (number, count): which rotary embedding it uses."""
    name, norm = NORMS[parts.norm.kind]
    experts = parts.mlp.experts and parts.mlp.experts.number
    layer: ModuleSpec = get_gpt_layer_local_spec(num_experts=experts, normalization=name)
    layer.submodules.input_layernorm = norm
    layer.submodules.pre_mlp_layernorm = IdentityOp if parts.shared_norm else norm
    attention = layer.submodules.self_attention.submodules
    attention.core_attention = ModuleSpec(module=SdpaAttention, params={"kernels": kernels})
    if config.context_parallel_size > 1:  # kernels.check_context_parallel has checked that it is installed
        from megatron.core.extensions.transformer_engine import TEDotProductAttention

        attention.core_attention = TEDotProductAttention
    if _is_own_activation(config):
        mlp_submodules(layer).activation_func = Gated
    if parts.attention.qk_norm:
        attention.q_layernorm = attention.k_layernorm = norm
    layer.module = ParallelBlock if parts.parallel else RowLayer
    layer.params = layer.params | {"fused": bool(kernels and kernels.fused), "rope": rope}
    return layer
