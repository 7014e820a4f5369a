"""Models with the values of their published config.json. Data only."""

from __future__ import annotations

from typing import Any

Config = dict[str, Any]


def _llama(
    layers: int, hidden: int, heads: int, groups: int, ffn: int, vocab: int, positions: int, **more: Any
) -> Config:  # fmt: skip
    return {
        "model_type": "llama", "num_hidden_layers": layers, "hidden_size": hidden, "num_attention_heads": heads,
        "num_key_value_heads": groups, "intermediate_size": ffn, "vocab_size": vocab, "max_position_embeddings": positions,
        "rms_norm_eps": 1e-5, "tie_word_embeddings": False, **more,
    }  # fmt: skip


def _falcon(layers: int, hidden: int, heads: int, groups: int, **more: Any) -> Config:
    return {
        "model_type": "falcon", "num_hidden_layers": layers, "hidden_size": hidden, "num_attention_heads": heads,
        "num_kv_heads": groups, "vocab_size": 65024, "max_position_embeddings": 2048, "new_decoder_architecture": True,
        "parallel_attn": True, "multi_query": True, "alibi": False, "bias": False, **more,
    }  # fmt: skip


def _scaled(factor: float) -> Config:
    """Return the rotary settings of Llama 3.1 and later."""
    scaling = {
        "rope_type": "llama3", "factor": factor, "low_freq_factor": 1.0, "high_freq_factor": 4.0,
        "original_max_position_embeddings": 8192,
    }  # fmt: skip
    return {**_LLAMA3, "rope_scaling": scaling}


_TIED = {"tie_word_embeddings": True}
_CODE = {"rope_theta": 1000000.0}
_LLAMA3 = {"rope_theta": 500000.0}
_MISTRAL = {"model_type": "mistral", "rope_theta": 1000000.0}
_FALCON3 = {"rope_theta": 1000042.0, "rms_norm_eps": 1e-6, "head_dim": 256}
_QWEN = {"model_type": "qwen2", "rms_norm_eps": 1e-6, "rope_theta": 1000000.0}
_QWEN3 = {**_QWEN, "model_type": "qwen3", "head_dim": 128}
_LLAMA_405B = _llama(126, 16384, 128, 8, 53248, 128256, 131072, **_scaled(8.0))

MODELS: dict[str, Config] = {
    "llama2-7b": _llama(32, 4096, 32, 32, 11008, 32000, 4096),
    "llama2-13b": _llama(40, 5120, 40, 40, 13824, 32000, 4096),
    "llama2-70b": _llama(80, 8192, 64, 8, 28672, 32000, 4096),
    "codellama-7b": _llama(32, 4096, 32, 32, 11008, 32016, 16384, **_CODE),
    "codellama-13b": _llama(40, 5120, 40, 40, 13824, 32016, 16384, **_CODE),
    "codellama-34b": _llama(48, 8192, 64, 8, 22016, 32000, 16384, **_CODE),
    "codellama-70b": _llama(80, 8192, 64, 8, 28672, 32016, 16384, **_CODE),
    "tinyllama-1.1b": _llama(22, 2048, 32, 4, 5632, 32000, 2048),
    "smollm2-135m": _llama(30, 576, 9, 3, 1536, 49152, 8192, rope_theta=100000.0) | _TIED,
    "smollm2-360m": _llama(32, 960, 15, 5, 2560, 49152, 8192, rope_theta=100000.0) | _TIED,
    "smollm2-1.7b": _llama(24, 2048, 32, 32, 8192, 49152, 8192, rope_theta=130000.0) | _TIED,
    "llama3-8b": _llama(32, 4096, 32, 8, 14336, 128256, 8192, **_LLAMA3),
    "llama3-70b": _llama(80, 8192, 64, 8, 28672, 128256, 8192, **_LLAMA3),
    "llama3-405b": _LLAMA_405B,
    "llama3.1-8b": _llama(32, 4096, 32, 8, 14336, 128256, 131072, **_scaled(8.0)),
    "llama3.1-70b": _llama(80, 8192, 64, 8, 28672, 128256, 131072, **_scaled(8.0)),
    "llama3.1-405b": _LLAMA_405B,
    "llama3.2-1b": _llama(16, 2048, 32, 8, 8192, 128256, 131072, **_scaled(32.0)) | _TIED,
    "llama3.2-3b": _llama(28, 3072, 24, 8, 8192, 128256, 131072, **_scaled(32.0)) | _TIED,
    "llama3.3-70b": _llama(80, 8192, 64, 8, 28672, 128256, 131072, **_scaled(8.0)),
    "mistral-7b": _llama(32, 4096, 32, 8, 14336, 32000, 32768, model_type="mistral", sliding_window=4096),
    "mistral-7b-v0.2": _llama(32, 4096, 32, 8, 14336, 32000, 32768, **_MISTRAL, sliding_window=None),
    "mistral-7b-v0.3": _llama(32, 4096, 32, 8, 14336, 32768, 32768, **_MISTRAL, sliding_window=None),
    "qwen2-0.5b": _llama(24, 896, 14, 2, 4864, 151936, 32768, **_QWEN) | _TIED,
    "qwen2-1.5b": _llama(28, 1536, 12, 2, 8960, 151936, 32768, **_QWEN) | _TIED,
    "qwen2-7b": _llama(28, 3584, 28, 4, 18944, 152064, 32768, **_QWEN),
    "qwen2-72b": _llama(80, 8192, 64, 8, 29568, 152064, 32768, **_QWEN),
    "qwen2.5-0.5b": _llama(24, 896, 14, 2, 4864, 151936, 32768, **_QWEN) | _TIED,
    "qwen2.5-1.5b": _llama(28, 1536, 12, 2, 8960, 151936, 32768, **_QWEN) | _TIED,
    "qwen2.5-3b": _llama(36, 2048, 16, 2, 11008, 151936, 32768, **_QWEN) | _TIED,
    "qwen2.5-7b": _llama(28, 3584, 28, 4, 18944, 152064, 32768, **_QWEN),
    "qwen2.5-14b": _llama(48, 5120, 40, 8, 13824, 152064, 32768, **_QWEN),
    "qwen2.5-32b": _llama(64, 5120, 40, 8, 27648, 152064, 32768, **_QWEN),
    "qwen2.5-72b": _llama(80, 8192, 64, 8, 29568, 152064, 32768, **_QWEN),
    "qwen3-0.6b": _llama(28, 1024, 16, 8, 3072, 151936, 40960, **_QWEN3) | _TIED,
    "qwen3-1.7b": _llama(28, 2048, 16, 8, 6144, 151936, 40960, **_QWEN3) | _TIED,
    "qwen3-4b": _llama(36, 2560, 32, 8, 9728, 151936, 40960, **_QWEN3) | _TIED,
    "qwen3-8b": _llama(36, 4096, 32, 8, 12288, 151936, 40960, **_QWEN3),
    "qwen3-14b": _llama(40, 5120, 40, 8, 17408, 151936, 40960, **_QWEN3),
    "qwen3-32b": _llama(64, 5120, 64, 8, 25600, 151936, 40960, **_QWEN3),
    "falcon-7b": _falcon(32, 4544, 71, 1, new_decoder_architecture=False),
    "falcon-40b": _falcon(60, 8192, 128, 8),
    "falcon-180b": _falcon(80, 14848, 232, 8, tie_word_embeddings=False),
    "falcon3-1b": _llama(18, 2048, 8, 4, 8192, 131072, 4096, **_FALCON3),
    "falcon3-3b": _llama(22, 3072, 12, 4, 9216, 131072, 32768, **_FALCON3),
    "falcon3-7b": _llama(28, 3072, 12, 4, 23040, 131072, 32768, **_FALCON3),
    "falcon3-10b": _llama(40, 3072, 12, 4, 23040, 131072, 32768, **_FALCON3),
}
"""Name -> Hugging Face config."""
