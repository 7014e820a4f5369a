"""Tiny random models and tokenizers on disk, as transformers and sentencepiece themselves write them."""

from __future__ import annotations

from pathlib import Path

import torch
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedModel

BASE = {
    "vocab_size": 203,  # odd on purpose: no layout divides it without padding
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 4,
    "num_attention_heads": 8,
    "num_key_value_heads": 4,
    "max_position_embeddings": 128,
}
LLAMA3 = {
    "rope_type": "llama3",
    "rope_theta": 500000.0,
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 64,
}
YARN = {"rope_type": "yarn", "rope_theta": 1e4, "factor": 4.0, "original_max_position_embeddings": 32}
LONGROPE = {
    "rope_type": "longrope", "rope_theta": 1e4, "factor": 4.0, "original_max_position_embeddings": 32,
    "short_factor": [1.0, 1.5], "long_factor": [1.0, 4.0],
}  # fmt: skip
SHAPES: dict[str, dict] = {
    "grouped": {},
    "multi-head": {"num_key_value_heads": 8},
    "multi-query": {"num_key_value_heads": 1},
    "tied": {"tie_word_embeddings": True},
    "vocabulary 32003": {"vocab_size": 32003, "hidden_size": 16},
    "head_dim": {"head_dim": 6},
    "theta 1e6": {"rope_parameters": {"rope_type": "default", "rope_theta": 1e6}, "rms_norm_eps": 1e-5},
    "linear rope": {"rope_parameters": {"rope_type": "linear", "rope_theta": 1e4, "factor": 4.0}},
    "llama3 rope": {"rope_parameters": LLAMA3},
}
"""Llamas."""

_FALCON = {"hidden_size": 64, "num_attention_heads": 8, "layer_norm_epsilon": 1e-5}
FAMILIES: dict[str, tuple[str, dict]] = {
    "llama": ("llama", {}),
    "llama, head_dim 80": ("llama", {"head_dim": 80, "num_attention_heads": 4, "num_key_value_heads": 2}),
    "llama, relu, tied": ("llama", {"hidden_act": "relu", "tie_word_embeddings": True}),
    "llama, dynamic rope": (
        "llama",
        {"max_position_embeddings": 32, "rope_parameters": {"rope_type": "dynamic", "rope_theta": 1e4, "factor": 2.0}},
    ),
    "llama, longrope": ("llama", {"rope_parameters": LONGROPE}),
    "mistral": ("mistral", {"sliding_window": 11}),
    "mistral, no window, theta 1e6": (
        "mistral",
        {"sliding_window": None, "rope_parameters": {"rope_type": "default", "rope_theta": 1e6}},
    ),
    "qwen2": ("qwen2", {}),
    "qwen2, tied, multi-head, yarn": (
        "qwen2",
        {"tie_word_embeddings": True, "num_key_value_heads": 8, "rope_parameters": YARN},
    ),
    "qwen2, window from layer 2": ("qwen2", {"use_sliding_window": True, "sliding_window": 9, "max_window_layers": 2}),
    "qwen3": ("qwen3", {"head_dim": 12}),
    "qwen3, tied": ("qwen3", {"head_dim": 16, "tie_word_embeddings": True}),
    "falcon 7b": ("falcon", _FALCON),
    "falcon 40b": ("falcon", {**_FALCON, "new_decoder_architecture": True, "num_kv_heads": 4}),
    "falcon 40b, relu, untied, yarn": (
        "falcon",
        {
            **_FALCON,
            "new_decoder_architecture": True,
            "num_kv_heads": 2,
            "activation": "relu",
            "tie_word_embeddings": False,
            "rope_parameters": YARN,
            "ffn_hidden_size": 96,
        },
    ),
    "falcon 11b": (
        "falcon",
        {**_FALCON, "new_decoder_architecture": True, "num_kv_heads": 4, "num_ln_in_parallel_attn": 1},
    ),
    "falcon, multi-head": ("falcon", {**_FALCON, "multi_query": False}),
}
"""Every family in several shapes: name -> (model_type, config entries). A new family adds rows."""


def make_model(
    folder: Path,
    model_type: str = "llama",
    dtype: torch.dtype = torch.float32,
    max_shard_size: str = "5GB",
    **changes,
) -> PreTrainedModel:
    """A random model, saved. Norm weights are random too: ones would hide a mix-up; so are biases."""
    torch.manual_seed(1)
    model = AutoModelForCausalLM.from_config(AutoConfig.for_model(model_type, **{**BASE, **changes}))
    with torch.no_grad():
        for name, weight in model.named_parameters():
            scale = weight.dim() == 1 and name.endswith("weight")
            weight.copy_(torch.randn_like(weight) * 0.1 + scale)
    model = model.to(dtype)
    model.save_pretrained(folder, max_shard_size=max_shard_size)
    return model


def make_llama(folder: Path, **options) -> PreTrainedModel:
    return make_model(folder, "llama", **options)


def make_family(folder: Path, name: str, **options) -> PreTrainedModel:
    """A row of FAMILIES."""
    model_type, changes = FAMILIES[name]
    return make_model(folder, model_type, **{**changes, **options})


def make_sentencepiece(folder: Path, vocab_size: int = 203) -> Path:
    """folder/tokenizer.model with exactly vocab_size pieces."""
    import sentencepiece

    letters = "abcdefghijklmnopqrstuvwxyz"
    text = folder / "text.txt"
    folder.mkdir(parents=True, exist_ok=True)
    text.write_text("\n".join(f"{a}{b} {b}{a}{c} plum {c}{b}" for a in letters for b in letters for c in letters[::5]))
    sentencepiece.SentencePieceTrainer.train(
        input=str(text), model_prefix=str(folder / "tokenizer"), vocab_size=vocab_size, model_type="bpe", minloglevel=2
    )
    text.unlink()
    return folder / "tokenizer.model"


def same_tensors(first: torch.nn.Module, second: torch.nn.Module) -> bool:
    """Bit for bit, names and types included."""
    one, two = first.state_dict(), second.state_dict()
    return set(one) == set(two) and all(one[k].dtype == two[k].dtype and torch.equal(one[k], two[k]) for k in one)


def logits(model: PreTrainedModel, vocab_size: int, length: int = 100) -> torch.Tensor:
    """[1, length, v] of a fixed random text; long enough to leave the first of the llama3 rope's ranges."""
    ids = torch.randint(0, vocab_size, (1, length), generator=torch.Generator().manual_seed(2))
    with torch.no_grad():
        return model(ids).logits
