"""Turning by a table of positions is what the engine does sample by sample, to the bit; compiled, up to rounding."""

import numpy as np
import pytest


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("lengths", [[29], [7, 1, 13, 8]])
def test_packed_rows_are_turned_as_the_engine_turns_them(dtype, lengths, one_rank):
    ours, engines, compiled = one_rank.run(turned, dtype, lengths)[0]
    np.testing.assert_array_equal(ours, engines)
    np.testing.assert_allclose(compiled, engines, atol=1e-6 if dtype == "float32" else 0.04)


def turned(dtype, lengths):
    """Return queries [t, n, d] turned by ours, by the engine's own function for packed rows, and by ours compiled."""
    from types import SimpleNamespace

    import torch
    from megatron.core.models.common.embeddings.rope_utils import _apply_rotary_pos_emb_thd
    from megatron.core.models.common.embeddings.rotary_pos_embedding import RotaryEmbedding

    from megatron_ft.models.rotary import turn
    from megatron_ft.models.rows import packed_on

    torch.manual_seed(0)
    one = SimpleNamespace(size=lambda: 1, rank=lambda: 0)
    x = torch.randn(sum(lengths), 1, 4, 16).to(getattr(torch, dtype))
    rows, rotary = packed_on(lengths, torch.device("cpu")), _rotary(x.dtype)
    rotary.positions = rows.positions
    found = [turn(x, rotary(rows.max_seqlen_q), SimpleNamespace(apply_rope_fusion=fused)) for fused in (False, True)]
    engine = RotaryEmbedding(16, rotary_percent=1.0, rotary_base=5e4, cp_group=one)
    theirs = _apply_rotary_pos_emb_thd(x.squeeze(1), rows.boundaries, engine(max(lengths)), cp_group=one)
    return found[0].squeeze(1).float().numpy(), theirs.float().numpy(), found[1].squeeze(1).float().numpy()


def test_tables_are_made_once(one_rank):
    """By the longest row that is to come; only where frequencies depend on the length, one for each."""
    plain, dynamic = one_rank.run(made)[0]
    assert plain == [64, 100] and dynamic == [40, 70, 80]


def made():
    """Return the lengths of the tables that are made for texts of some lengths, without and with dynamic NTK."""
    import torch

    from megatron_ft.models.rotary import Rotary

    found = []
    for scaling in (None, {"rope_type": "dynamic", "factor": 2.0}):
        rotary, lengths = _rotary(torch.float32, scaling), []
        rotary._made = lambda length, rotary=rotary, lengths=lengths: (
            lengths.append(length),
            Rotary._made(rotary, length),
        )[1]
        for length in (40, 70, 40, 70) if scaling else (40, 64, 40, 100, 90):
            assert rotary(length).shape == (length, 1, 1, 32)
        if scaling:
            rotary(80)
        found.append(lengths)
    return found


def _rotary(dtype, scaling=None):
    from types import SimpleNamespace

    from megatron_ft.models.architecture import Architecture
    from megatron_ft.models.rotary import Rotary

    arch = Architecture(
        family="llama", num_layers=1, hidden_size=64, ffn_hidden_size=64, num_attention_heads=4, num_query_groups=4,
        head_dim=16, vocab_size=203, max_position_embeddings=64, norm_epsilon=1e-5, rope_theta=5e4, rope_scaling=scaling,
    )  # fmt: skip
    return Rotary(arch, dtype, 64, SimpleNamespace(size=lambda: 1, rank=lambda: 0))
