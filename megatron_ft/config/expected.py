"""The section of flags that describe the model, which are compared with the checkpoint (training/model_flags.py). Names are Megatron's."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

RopeScaling = Literal["linear", "ntk", "ntk-margin", "ntk-yarn", "ntk-by-parts", "yarn", "dynamic"]
"""RoPE scaling methods that need only a factor: models/rope.py."""


@dataclass
class Model:
    """Expected architecture (read from the checkpoint; a flag that differs is an error)"""

    use_checkpoint_args: bool = False
    """use the checkpoint's value, with a warning, where a flag of this section differs"""
    model_name: str | None = None
    """expected model family: llama, llama2, mistral, falcon, ..."""
    num_layers: int | None = None
    """expected number of transformer layers"""
    hidden_size: int | None = None
    """expected width of the residual stream"""
    ffn_hidden_size: int | None = None
    """expected width of the MLP's hidden layer"""
    num_attention_heads: int | None = None
    """expected number of query heads"""
    num_attention_heads_kv: int | None = None
    """expected number of key-value heads"""
    max_position_embeddings: int | None = None
    """expected number of positions (context length) of the model"""
    position_embedding_type: Literal["rotary", "rope"] | None = None
    """expected position embedding; rotary and rope are the same, and nothing else is supported"""
    use_rms_norm: bool = False
    """the model is expected to have RMSNorm instead of LayerNorm"""
    layernorm_epsilon: float | None = None
    """expected epsilon, added to the variance in the norms"""
    glu_activation: Literal["swiglu", "geglu", "reglu"] | None = None
    """expected gated activation of the MLP"""
    no_tie_embed_logits: bool = False
    """the model is expected to have separate weights in embedding and output layer"""
    normalization: Literal["RMSNorm", "LayerNorm"] | None = None
    """expected kind of the norms"""
    group_query_attention: bool = False
    """the model is expected to have fewer key-value heads than query heads, unless --num_attention_heads_kv is given"""
    kv_channels: int | None = None
    """expected size of an attention head"""
    rotary_base: float | None = None
    """expected base of the rotary embedding (rope_theta)"""
    rotary_percent: float | None = None
    """expected share of each head that the rotary embedding turns"""
    sliding_window_size: int | None = None
    """expected number of keys that a token sees, itself included"""
    window_size: str | None = None
    """expected window as Megatron-LM writes it, (left, right): the keys before a token that it sees, and 0; (-1, 0): no window"""
    vocab_size: int | None = None
    """expected number of tokens in the vocabulary, without padding rows"""
    disable_bias_linear: bool = False
    """the model is expected to have no biases; with --add_qkv_bias only those of query, key and value"""
    add_qkv_bias: bool = False
    """the model is expected to have biases on query, key and value"""
    qk_layernorm: bool = False
    """the model is expected to normalise query and key heads"""
    parallel_attn: bool = False
    """the model is expected to have attention and MLP side by side (Falcon)"""
    parallel_layernorm: bool = False
    """the model is expected to have two norms in front of attention and MLP side by side (Falcon 40B)"""
    tokenizer_type: str | None = None
    """with --vocab_file: type of that tokenizer, SentencePieceTokenizer or a Hugging Face one"""
    vocab_file: str | None = None
    """expected tokenizer file, compared with the checkpoint's tokenizer"""
    vocab_extra_ids_list: str | None = None
    """tokens added to the --vocab_file tokenizer, separated by commas"""
    use_rope_scaling: bool = False
    """the model is expected to have Llama 3's RoPE scaling, by --rope_scaling_factor (default 8), as Megatron-LM means it"""
    rope_scaling_type: RopeScaling | None = None
    """method that extends the context of a model without RoPE scaling; default with --rope_scaling_factor: linear"""
    rope_scaling_factor: float | None = None
    """extend the model's context by this factor with RoPE scaling; 1.0: no scaling"""
