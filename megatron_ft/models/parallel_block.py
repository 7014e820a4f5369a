"""A transformer layer whose attention and MLP read the same residual: x + dropout(attention(norm x) + mlp(norm x)).

megatron-core computes the two in sequence. Everything inside them (tensor and sequence parallelism, KV cache, packing) is the engine's.
Only the sum of the outputs is computed here, with the engine's bias-dropout-add, so that one dropout applies to the sum.
"""

from __future__ import annotations

from typing import Any

from megatron.core import tensor_parallel
from megatron.core.transformer.identity_op import IdentityOp
from megatron.core.utils import make_viewless_tensor
from torch import Tensor

from megatron_ft.models.dropout import RowLayer


class ParallelBlock(RowLayer):
    """One norm for both (the spec has no pre_mlp_layernorm) or a norm each."""

    def forward(
        self, hidden_states: Tensor, *_: Any, inference_context: Any = None, packed_seq_params: Any = None, **options: Any
    ) -> tuple[Tensor, None]:  # fmt: skip
        """Compute hidden_states [s, b, h] -> ([s, b, h], None), as the engine's layer."""
        self.keys = getattr(packed_seq_params, "keys", None)
        options = {name: value for name, value in options.items() if name in _ATTENTION}
        options["rotary_pos_emb"] = self.own_table(options.get("rotary_pos_emb"))
        options |= {"inference_context": inference_context, "packed_seq_params": packed_seq_params}
        again: list[tensor_parallel.CheckpointWithoutOutput] = []
        normed = self._normed(self.input_layernorm, self.recompute_input_layernorm, hidden_states, again)
        outputs = [self.self_attention(normed, **options)]
        if not isinstance(self.pre_mlp_layernorm, IdentityOp):
            normed = self._normed(self.pre_mlp_layernorm, self.recompute_pre_mlp_layernorm, hidden_states, again)
        recompute = self.recompute_mlp and self.training
        outputs.append(tensor_parallel.checkpoint(self.mlp, False, normed) if recompute else self.mlp(normed))
        total = sum(part for output in outputs for part in output if part is not None)
        for (
            norm
        ) in again:  # when the sum's gradient comes, before anything that reads a norm's output is differentiated
            norm.discard_output_and_register_recompute(total)
        join = self.mlp_bda(self.training, self.config.bias_dropout_fusion)
        with self.bias_dropout_add_exec_handler():
            output = join((total, None), hidden_states, self.hidden_dropout)
        return make_viewless_tensor(inp=output, requires_grad=output.requires_grad, keep_graph=True), None

    def _normed(self, norm: Any, recompute: bool, x: Tensor, again: list) -> Tensor:
        """Return norm(x); if it is recomputed, it is kept only until `again` discards it."""
        if not (recompute and self.training):
            return norm(x)
        again.append(tensor_parallel.CheckpointWithoutOutput())
        return again[-1].checkpoint(norm, x)


_ATTENTION = (
    *("attention_mask", "rotary_pos_emb", "rotary_pos_cos", "rotary_pos_sin", "rotary_pos_cos_sin"),
    *("attention_bias", "sequence_len_offset"),
)
"""What the block passes down and attention takes, besides what `forward` names."""
