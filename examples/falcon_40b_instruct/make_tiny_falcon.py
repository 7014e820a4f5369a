"""A Falcon with random weights and a tokenizer, in the files of a Hugging Face model folder.

Its shape is Falcon-40B's in small: attention and MLP side by side, two norms, grouped keys and values, tied embeddings. It stands where the
downloaded model would stand. Written without transformers.
"""

from __future__ import annotations

import json
import sys
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from megatron_ft.config.cli import Command, run_script
from megatron_ft.errors import ConfigError
from megatron_ft.files import atomic_folder, write_json

_HEAD = 64  # width of a head, as in Falcon-40B
_END = "<|endoftext|>"


@dataclass(frozen=True)
class TinyFalcon:
    """The model to make"""

    output_dir: str = field(metadata={"required": True})
    """Model folder to make."""
    hidden_size: int = 768
    """Width, a multiple of 128; heads are 64 wide."""
    num_layers: int = 8
    """Layers."""
    seed: int = 1
    """Of the weights."""
    texts: str | None = None
    """JSON lines with "text", to train a tokenizer on; default: a token is a byte."""
    vocab_size: int = 2048
    """With --texts: tokens of the tokenizer."""


COMMAND = Command(
    name="make_tiny_falcon.py",
    summary="a small random Falcon as a Hugging Face model folder",
    sections=(TinyFalcon,),
    positional=("output_dir",),
)


def run(options: TinyFalcon) -> None:
    """Raises UserError: a width that heads do not divide, or a folder in the way."""
    if options.hidden_size < 2 * _HEAD or options.hidden_size % (2 * _HEAD):
        raise ConfigError(f"--hidden_size {options.hidden_size}: must be a multiple of {2 * _HEAD}")
    with atomic_folder(options.output_dir) as folder:
        vocabulary = write_tokenizer(folder, Path(options.texts) if options.texts else None, options.vocab_size)
        config = falcon_config(options, vocabulary)
        write_json(folder / "config.json", config)
        write_json(folder / "generation_config.json", {"bos_token_id": 0, "eos_token_id": 0})
        parameters = write_weights(folder / "model.safetensors", config, options.seed)
    print(f"{parameters / 1e6:.1f} M random parameters in bf16 -> {options.output_dir}")


def write_tokenizer(folder: Path, texts: Path | None = None, vocab_size: int = 0) -> int:
    """Write a tokenizer whose tokens are bytes, and the end of a text; or pieces of words of the texts. Returns its size."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

    letters = sorted(pre_tokenizers.ByteLevel.alphabet())
    vocabulary = {token: number for number, token in enumerate([_END, *letters])}
    tokenizer = Tokenizer(models.BPE(vocab=vocabulary, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    if texts:
        trainer = trainers.BpeTrainer(
            vocab_size=vocab_size, special_tokens=[_END], initial_alphabet=letters, show_progress=False
        )
        lines = texts.read_text(encoding="utf-8").splitlines()
        tokenizer.train_from_iterator((json.loads(line)["text"] for line in lines), trainer)
    tokenizer.add_special_tokens([_END])
    tokenizer.save(str(folder / "tokenizer.json"))
    entries = {"tokenizer_class": "PreTrainedTokenizerFast", "eos_token": _END, "bos_token": _END}
    write_json(folder / "tokenizer_config.json", entries)
    return tokenizer.get_vocab_size()


def falcon_config(options: TinyFalcon, vocabulary: int) -> dict[str, Any]:
    """config.json as transformers 4 and 5 both read it."""
    heads = options.hidden_size // _HEAD
    return {
        "architectures": ["FalconForCausalLM"],
        "model_type": "falcon",
        "vocab_size": vocabulary,
        "hidden_size": options.hidden_size,
        "num_hidden_layers": options.num_layers,
        "num_attention_heads": heads,
        "num_kv_heads": heads // 2,
        "new_decoder_architecture": True,
        "parallel_attn": True,
        "multi_query": True,
        "bias": False,
        "alibi": False,
        "layer_norm_epsilon": 1e-5,
        "max_position_embeddings": 2048,
        "rope_theta": 10000.0,
        "tie_word_embeddings": True,
        "bos_token_id": 0,
        "eos_token_id": 0,
        "torch_dtype": "bfloat16",
    }


def write_weights(path: Path, config: dict[str, Any], seed: int) -> int:
    """Norms 1 and 0, matrices normal with standard deviation 0.02. Returns the number of parameters."""
    import torch
    from safetensors.torch import save

    generator = torch.Generator().manual_seed(seed)
    weights = {}
    for name, shape in tensor_shapes(config).items():
        made = torch.randn(shape, generator=generator) * 0.02 if len(shape) == 2 else torch.zeros(shape)
        weights[name] = (
            made + 1 if name.endswith(("ln_attn.weight", "ln_mlp.weight", "ln_f.weight")) else made
        ).bfloat16()
    path.write_bytes(save(weights, metadata={"format": "pt"}))
    return sum(weight.numel() for weight in weights.values())


def tensor_shapes(config: dict[str, Any]) -> dict[str, tuple[int, ...]]:
    """Every tensor of a Falcon-40B by its Hugging Face name, matrices as [out, in]."""
    hidden = config["hidden_size"]
    head_rows = config["num_attention_heads"] + 2 * config["num_kv_heads"]
    layer = {
        "ln_attn.weight": (hidden,), "ln_attn.bias": (hidden,), "ln_mlp.weight": (hidden,), "ln_mlp.bias": (hidden,),
        "self_attention.query_key_value.weight": (head_rows * _HEAD, hidden),
        "self_attention.dense.weight": (hidden, hidden),
        "mlp.dense_h_to_4h.weight": (4 * hidden, hidden),
        "mlp.dense_4h_to_h.weight": (hidden, 4 * hidden),
    }  # fmt: skip
    found: dict[str, tuple[int, ...]] = {"transformer.word_embeddings.weight": (config["vocab_size"], hidden)}
    for number in range(config["num_hidden_layers"]):
        found |= {f"transformer.h.{number}.{name}": shape for name, shape in layer.items()}
    return found | {"transformer.ln_f.weight": (hidden,), "transformer.ln_f.bias": (hidden,)}


if __name__ == "__main__":
    sys.exit(run_script(COMMAND, run))
