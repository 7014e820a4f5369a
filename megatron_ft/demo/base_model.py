"""Write the demo's base model: a tokenizer and a tiny Llama with random weights, as a Hugging Face model folder.

Written without transformers, in the files a downloaded model has: config.json, generation_config.json,
model.safetensors, tokenizer.model and tokenizer_config.json.
"""

from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from megatron_ft.files import atomic_folder, write_json

BOS, EOS = 1, 2  # SentencePiece's own, as in Llama 2


@dataclass(frozen=True)
class Shape:
    """The size of the model. Like Llama 2 70B it has grouped queries and an untied output layer."""

    vocab_size: int = 1000
    hidden_size: int = 192
    intermediate_size: int = 512
    num_hidden_layers: int = 4
    num_attention_heads: int = 6
    num_key_value_heads: int = 2
    max_position_embeddings: int = 512


def write_base_model(folder: Path, texts: Iterable[str], seed: int, shape: Shape = Shape()) -> None:
    """Train the tokenizer on `texts`, draw the weights and write the folder. Deterministic for given arguments."""
    with atomic_folder(folder) as made:
        pieces = _train_tokenizer(made / "tokenizer.model", texts, shape.vocab_size)
        write_json(made / "config.json", _config(shape, pieces))
        write_json(made / "generation_config.json", {"bos_token_id": BOS, "eos_token_id": EOS})
        write_json(made / "tokenizer_config.json", _tokenizer_config(shape))
        _write_weights(made / "model.safetensors", shape, pieces, seed)


def _train_tokenizer(path: Path, texts: Iterable[str], vocab_size: int) -> int:
    """Train a SentencePiece model with Llama 2's settings (BPE with byte fallback). Return its vocabulary size."""
    import sentencepiece

    with path.open("wb") as file:
        sentencepiece.SentencePieceTrainer.train(
            sentence_iterator=iter(texts), model_writer=file, vocab_size=vocab_size, model_type="bpe",
            byte_fallback=True, character_coverage=1.0, normalization_rule_name="identity",
            remove_extra_whitespaces=False, split_digits=True, num_threads=1, minloglevel=2,
        )  # fmt: skip
    return sentencepiece.SentencePieceProcessor(model_file=str(path)).get_piece_size()


def _config(shape: Shape, vocab_size: int) -> dict[str, Any]:
    return {
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
        "vocab_size": vocab_size,
        "hidden_size": shape.hidden_size,
        "intermediate_size": shape.intermediate_size,
        "num_hidden_layers": shape.num_hidden_layers,
        "num_attention_heads": shape.num_attention_heads,
        "num_key_value_heads": shape.num_key_value_heads,
        "max_position_embeddings": shape.max_position_embeddings,
        "rms_norm_eps": 1e-5,
        "rope_theta": 10000.0,
        "hidden_act": "silu",
        "tie_word_embeddings": False,
        "bos_token_id": BOS,
        "eos_token_id": EOS,
        "torch_dtype": "float32",
    }


def _tokenizer_config(shape: Shape) -> dict[str, Any]:
    return {
        "tokenizer_class": "LlamaTokenizer",
        "bos_token": "<s>",
        "eos_token": "</s>",
        "unk_token": "<unk>",
        "add_bos_token": False,
        "legacy": True,
        "model_max_length": shape.max_position_embeddings,
    }


def _write_weights(path: Path, shape: Shape, vocab_size: int, seed: int) -> None:
    import torch
    from safetensors.torch import save

    hidden, ffn = shape.hidden_size, shape.intermediate_size
    kv_size = hidden // shape.num_attention_heads * shape.num_key_value_heads
    layer = {
        "self_attn.q_proj": (hidden, hidden), "self_attn.k_proj": (kv_size, hidden), "self_attn.v_proj": (kv_size, hidden),
        "self_attn.o_proj": (hidden, hidden), "mlp.gate_proj": (ffn, hidden), "mlp.up_proj": (ffn, hidden),
        "mlp.down_proj": (hidden, ffn), "input_layernorm": (hidden,), "post_attention_layernorm": (hidden,),
    }  # fmt: skip
    shapes = {"model.embed_tokens": (vocab_size, hidden), "model.norm": (hidden,), "lm_head": (vocab_size, hidden)}
    for n in range(shape.num_hidden_layers):
        shapes |= {f"model.layers.{n}.{name}": size for name, size in layer.items()}
    random = torch.Generator().manual_seed(seed)
    weights = {f"{name}.weight": _initial(size, random) for name, size in shapes.items()}
    path.write_bytes(save(weights, metadata={"format": "pt"}))  # save_file would make it readable by its owner only


def _initial(size: tuple[int, ...], random: Any) -> Any:
    """Return ones for norms; for matrices normal values with std 0.04, for few narrow layers (0.02 is for wide ones)."""
    import torch

    return torch.ones(size) if len(size) == 1 else torch.empty(size).normal_(0.0, 0.04, generator=random)
