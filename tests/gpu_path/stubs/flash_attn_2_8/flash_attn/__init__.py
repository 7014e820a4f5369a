"""flash-attn's function for packed rows with the signature of 2.8 (flash_attn_interface.py), computed with masks."""

__version__ = "2.8.3"


def flash_attn_varlen_func(
    q, k, v, cu_seqlens_q, cu_seqlens_k, max_seqlen_q, max_seqlen_k, dropout_p=0.0, softmax_scale=None, causal=False,
    window_size=(-1, -1), softcap=0.0, alibi_slopes=None, deterministic=False, return_attn_probs=False, block_table=None,
):  # fmt: skip
    """[t, n, d]; arguments beyond those of plain training are refused."""
    from tests.gpu_path.pretended.attention import attended, check_arguments

    if softcap or alibi_slopes is not None or return_attn_probs or block_table is not None:
        raise NotImplementedError("this stub knows none of softcap, alibi_slopes, return_attn_probs, block_table")
    for boundaries, longest in ((cu_seqlens_q, max_seqlen_q), (cu_seqlens_k, max_seqlen_k)):
        check_arguments(q, k, v, boundaries, longest)
    window = (window_size[0], 0) if causal else window_size
    return attended(q, k, v, cu_seqlens_q, softmax_scale, window, dropout_p)
