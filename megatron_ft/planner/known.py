"""Known models, with the values of their published config.json, and known GPUs. Data only."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from megatron_ft.checkpoints.folder import CONFIG, describe, find_checkpoint, read_config
from megatron_ft.config.hints import nearest
from megatron_ft.errors import ConfigError
from megatron_ft.files import read_json
from megatron_ft.models.architecture import Architecture
from megatron_ft.models.families import parse_hf_config


def _llama(
    layers: int, hidden: int, heads: int, groups: int, ffn: int, vocab: int, positions: int, **more: Any
) -> dict[str, Any]:
    return {
        "model_type": "llama", "num_hidden_layers": layers, "hidden_size": hidden, "num_attention_heads": heads,
        "num_key_value_heads": groups, "intermediate_size": ffn, "vocab_size": vocab, "max_position_embeddings": positions,
        "rms_norm_eps": 1e-5, "tie_word_embeddings": False, **more,
    }  # fmt: skip


def _falcon(layers: int, hidden: int, heads: int, groups: int, **more: Any) -> dict[str, Any]:
    return {
        "model_type": "falcon", "num_hidden_layers": layers, "hidden_size": hidden, "num_attention_heads": heads,
        "num_kv_heads": groups, "vocab_size": 65024, "max_position_embeddings": 2048, "new_decoder_architecture": True,
        "parallel_attn": True, "multi_query": True, "alibi": False, "bias": False, **more,
    }  # fmt: skip


_LLAMA3 = {"rope_theta": 500000.0}
_QWEN = {"model_type": "qwen2", "rms_norm_eps": 1e-6, "rope_theta": 1000000.0}

MODELS: dict[str, dict[str, Any]] = {
    "llama2-7b": _llama(32, 4096, 32, 32, 11008, 32000, 4096),
    "llama2-13b": _llama(40, 5120, 40, 40, 13824, 32000, 4096),
    "llama2-70b": _llama(80, 8192, 64, 8, 28672, 32000, 4096),
    "codellama-34b": _llama(48, 8192, 64, 8, 22016, 32000, 16384, rope_theta=1000000.0),
    "llama3-8b": _llama(32, 4096, 32, 8, 14336, 128256, 8192, **_LLAMA3),
    "llama3-70b": _llama(80, 8192, 64, 8, 28672, 128256, 8192, **_LLAMA3),
    "mistral-7b": _llama(32, 4096, 32, 8, 14336, 32000, 32768, model_type="mistral", sliding_window=4096),
    "qwen2.5-0.5b": _llama(24, 896, 14, 2, 4864, 151936, 32768, **_QWEN, ) | {"tie_word_embeddings": True},
    "qwen2.5-7b": _llama(28, 3584, 28, 4, 18944, 152064, 32768, **_QWEN),
    "qwen2.5-14b": _llama(48, 5120, 40, 8, 13824, 152064, 32768, **_QWEN),
    "qwen2.5-32b": _llama(64, 5120, 40, 8, 27648, 152064, 32768, **_QWEN),
    "qwen2.5-72b": _llama(80, 8192, 64, 8, 29568, 152064, 32768, **_QWEN),
    "falcon-7b": _falcon(32, 4544, 71, 1, new_decoder_architecture=False),
    "falcon-40b": _falcon(60, 8192, 128, 8),
    "falcon-180b": _falcon(80, 14848, 232, 8, tie_word_embeddings=False),
}  # fmt: skip
"""Name -> Hugging Face config."""


@dataclass(frozen=True)
class Gpu:
    """memory in GB (1e9 bytes), dense bf16 speed in TFLOP/s, link between GPUs of a node in GB/s per direction."""

    memory: float
    tflops: float
    link: float


GPUS: dict[str, Gpu] = {
    "a100-40gb": Gpu(42.4, 312, 300), "a100-80gb": Gpu(85.2, 312, 300), "h100-80gb": Gpu(85.5, 989, 450),
    "h200-141gb": Gpu(150.7, 989, 450), "b200-180gb": Gpu(191.5, 2250, 900), "mi300x-192gb": Gpu(206.1, 1307, 448),
    "l40s-48gb": Gpu(47.8, 362, 32), "a6000-48gb": Gpu(51.0, 155, 56), "rtx4090-24gb": Gpu(25.3, 165, 32),
    "rtx3090-24gb": Gpu(25.3, 71, 56),
}  # fmt: skip
"""Source: the manufacturers' data sheets; memory as the driver reports it."""


def architecture(model: str) -> Architecture:
    """Return the architecture of a known name, a Hugging Face config.json or its folder, or a checkpoint.

    Raise ConfigError with the known names.
    """
    if model.lower() in MODELS:
        return parse_hf_config(MODELS[model.lower()])[1]
    path = Path(model)
    file = path / CONFIG if path.is_dir() else path
    if file.is_file():
        config = read_json(file)
        if isinstance(config, dict) and "architecture" in config:
            return read_config(file.parent).architecture
        return parse_hf_config(config)[1]
    if path.is_dir():
        return describe(find_checkpoint(path)).architecture
    hint = nearest(model.lower(), list(MODELS))
    raise ConfigError(
        f"{model}: no such file, and no known model of this name{hint}; known models: {', '.join(MODELS)}"
    )


def gpu(name: str) -> Gpu:
    """Return a known GPU. Raise ConfigError with the known names."""
    if name.lower() not in GPUS:
        hint = nearest(name.lower(), list(GPUS))
        raise ConfigError(
            f"--gpu {name} is not known{hint}; choose one of {', '.join(GPUS)}, and set --gpu_memory_gb if needed"
        )
    return GPUS[name.lower()]
