"""Tiny random Llamas and tokenizers on disk, as transformers and sentencepiece themselves write them."""

from __future__ import annotations

from pathlib import Path

import torch
from transformers import LlamaConfig, LlamaForCausalLM

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


def make_llama(
    folder: Path, dtype: torch.dtype = torch.float32, max_shard_size: str = "5GB", **changes
) -> LlamaForCausalLM:
    """A random model, saved. Norm weights are random too: ones would hide a mix-up."""
    torch.manual_seed(1)
    model = LlamaForCausalLM(LlamaConfig(**{**BASE, **changes}))
    with torch.no_grad():
        for weight in model.parameters():
            weight.copy_(torch.randn_like(weight) * 0.1 + (weight.dim() == 1))
    model = model.to(dtype)
    model.save_pretrained(folder, max_shard_size=max_shard_size)
    return model


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


def logits(model: LlamaForCausalLM, vocab_size: int, length: int = 100) -> torch.Tensor:
    """[1, length, v] of a fixed random text; long enough to leave the first of the llama3 rope's ranges."""
    ids = torch.randint(0, vocab_size, (1, length), generator=torch.Generator().manual_seed(2))
    with torch.no_grad():
        return model(ids).logits
