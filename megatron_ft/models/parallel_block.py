"""A transformer layer whose attention and MLP read the same residual: x + dropout(attention(norm x) + mlp(norm x)).

megatron-core has the two one after the other. Everything inside them (tensor and sequence parallelism, KV cache, packing) stays the
engine's; only how the outputs meet is ours, with the engine's own bias-dropout-add, so that one dropout falls on the sum.
"""

from __future__ import annotations

from megatron.core.transformer.identity_op import IdentityOp
from megatron.core.transformer.transformer_layer import TransformerLayer
from megatron.core.utils import make_viewless_tensor
from torch import Tensor


class ParallelBlock(TransformerLayer):
    """One norm for both (the spec has no pre_mlp_layernorm) or a norm each."""

    def forward(self, hidden_states: Tensor, *_, inference_context=None, **options):
        """hidden_states [s, b, h] -> ([s, b, h], None), as the engine's own layer."""
        options = {name: value for name, value in options.items() if name in _ATTENTION}
        normed = self.input_layernorm(hidden_states)
        attention, attention_bias = self.self_attention(normed, inference_context=inference_context, **options)
        shared = isinstance(self.pre_mlp_layernorm, IdentityOp)
        mlp, mlp_bias = self.mlp(normed if shared else self.pre_mlp_layernorm(hidden_states))
        for bias in (attention_bias, mlp_bias):
            mlp = mlp if bias is None else mlp + bias
        join = self.mlp_bda(self.training, self.config.bias_dropout_fusion)
        with self.bias_dropout_add_exec_handler():
            output = join((attention + mlp, None), hidden_states, self.hidden_dropout)
        return make_viewless_tensor(inp=output, requires_grad=output.requires_grad, keep_graph=True), None


_ATTENTION = (
    *("attention_mask", "rotary_pos_emb", "rotary_pos_cos", "rotary_pos_sin", "rotary_pos_cos_sin"),
    *("attention_bias", "packed_seq_params", "sequence_len_offset"),
)
"""What the block passes down and attention takes."""
