"""megatron-core's rotary module for methods whose frequencies depend on how long the text is (dynamic NTK, longrope)."""

from __future__ import annotations

from megatron.core.models.common.embeddings.rotary_pos_embedding import RotaryEmbedding

from megatron_ft.models.architecture import Architecture
from megatron_ft.models.rope import inverse_frequencies


class LengthRotary(RotaryEmbedding):
    """Frequencies follow the longest text of a batch, packed or padded, as in transformers; with a KV cache, the room in the cache,
    so that keys read early fit those read late."""

    def __init__(self, plain: RotaryEmbedding, arch: Architecture):
        super().__init__(arch.head_dim, rotary_percent=1.0, rotary_base=arch.rope_theta, cp_group=plain.cp_group)
        self.inv_freq, self.arch = plain.inv_freq, arch

    def get_freqs_non_repeated(self, max_seq_len: int, offset: int = 0):
        """[max_seq_len, head_dim / 2] angles."""
        arch = self.arch
        self.inv_freq = inverse_frequencies(
            arch.head_dim, arch.rope_theta, arch.rope_scaling, arch.max_position_embeddings, max_seq_len + offset
        ).to(self.inv_freq.device)
        return super().get_freqs_non_repeated(max_seq_len, offset)
