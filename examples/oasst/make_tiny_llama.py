"""A small Llama with random weights and a real tokenizer, in the files of a Hugging Face model folder.

Its shape is Llama-2-70B's in small: grouped queries, an untied output layer, the vocabulary of the tokenizer given.
Stands where a downloaded model would stand. Written without transformers.
"""

from __future__ import annotations

import shutil
import sys
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from megatron_ft.config.cli import Command, run_script
from megatron_ft.data.tokenizer import load_tokenizer
from megatron_ft.files import atomic_folder, write_json


@dataclass(frozen=True)
class TinyLlama:
    """The model to make"""

    tokenizer: str = field(metadata={"required": True})
    """Llama's tokenizer.model."""
    output_dir: str = field(metadata={"required": True})
    """Model folder to make."""
    hidden_size: int = 128
    """Width; heads are 16 wide."""
    num_layers: int = 4
    """Layers."""
    max_position_embeddings: int = 4096
    """Longest context."""
    seed: int = 1
    """Of the weights."""


COMMAND = Command(
    name="make_tiny_llama.py",
    summary="a small random Llama as a Hugging Face model folder",
    sections=(TinyLlama,),
    positional=("tokenizer", "output_dir"),
)


def run(options: TinyLlama) -> None:
    """Raises UserError: no tokenizer there, or a folder in the way."""
    tokenizer = load_tokenizer(options.tokenizer)
    config = llama_config(options, tokenizer.base_vocab_size, tokenizer.bos_id, tokenizer.eos_id)
    with atomic_folder(options.output_dir) as folder:
        write_json(folder / "config.json", config)
        shutil.copyfile(tokenizer.source_files[0], folder / "tokenizer.model")
        parameters = write_weights(folder / "model.safetensors", config, options.seed)
    print(f"{parameters / 1e6:.1f} M random parameters, vocabulary {config['vocab_size']} -> {options.output_dir}")


def llama_config(options: TinyLlama, vocab_size: int, bos_id: int | None, eos_id: int | None) -> dict[str, Any]:
    """config.json as transformers 4 and 5 both read it."""
    heads = options.hidden_size // 16
    return {
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
        "vocab_size": vocab_size,
        "hidden_size": options.hidden_size,
        "intermediate_size": 3 * options.hidden_size,
        "num_hidden_layers": options.num_layers,
        "num_attention_heads": heads,
        "num_key_value_heads": max(1, heads // 2),
        "max_position_embeddings": options.max_position_embeddings,
        "rms_norm_eps": 1e-5,
        "rope_theta": 10000.0,
        "hidden_act": "silu",
        "tie_word_embeddings": False,
        "bos_token_id": bos_id,
        "eos_token_id": eos_id,
        "torch_dtype": "float32",
    }


def write_weights(path: Path, config: dict[str, Any], seed: int) -> int:
    """Norms 1, matrices normal with standard deviation 0.02. Returns the number of parameters."""
    import torch
    from safetensors.torch import save

    generator = torch.Generator().manual_seed(seed)
    weights = {
        name: torch.ones(shape) if len(shape) == 1 else torch.randn(shape, generator=generator) * 0.02
        for name, shape in tensor_shapes(config).items()
    }
    Path(path).write_bytes(save(weights, metadata={"format": "pt"}))  # save_file's would be for their owner only
    return sum(weight.numel() for weight in weights.values())


def tensor_shapes(config: dict[str, Any]) -> dict[str, tuple[int, ...]]:
    """Every tensor of a Llama by its Hugging Face name, matrices as [out, in]."""
    hidden, ffn, vocab = config["hidden_size"], config["intermediate_size"], config["vocab_size"]
    key_rows = hidden * config["num_key_value_heads"] // config["num_attention_heads"]
    layer = {
        "input_layernorm": (hidden,),
        "self_attn.q_proj": (hidden, hidden),
        "self_attn.k_proj": (key_rows, hidden),
        "self_attn.v_proj": (key_rows, hidden),
        "self_attn.o_proj": (hidden, hidden),
        "post_attention_layernorm": (hidden,),
        "mlp.gate_proj": (ffn, hidden),
        "mlp.up_proj": (ffn, hidden),
        "mlp.down_proj": (hidden, ffn),
    }
    names = {"model.embed_tokens": (vocab, hidden), "model.norm": (hidden,), "lm_head": (vocab, hidden)}
    for n in range(config["num_hidden_layers"]):
        names |= {f"model.layers.{n}.{name}": shape for name, shape in layer.items()}
    return {f"{name}.weight": shape for name, shape in names.items()}


if __name__ == "__main__":
    sys.exit(run_script(COMMAND, run))
