"""A model as llama.cpp describes it: its architecture there, metadata, and the names, shapes and types of its tensors.

As llama.cpp's convert_hf_to_gguf.py writes them (conversion/llama.py, qwen.py, falcon.py).
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from math import prod
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from megatron_ft.errors import CheckpointError, ConfigError
from megatron_ft.models.architecture import Architecture
from megatron_ft.models.families import family_of
from megatron_ft.models.rope import attention_factor, inverse_frequencies
from megatron_ft.models.weights import Placed, Shape

if TYPE_CHECKING:
    import numpy as np
    from gguf import GGMLQuantizationType, GGUFWriter

NAMES = {"llama": "llama", "mistral": "llama", "qwen2": "qwen2", "qwen3": "qwen3", "falcon": "falcon"}
"""Family -> its name in llama.cpp."""
KINDS = {"gguf-f16": "F16", "gguf-q8_0": "Q8_0"}
"""--quantize -> the type of matrices."""
_BY_TABLE = ("llama",)
"""Those in which llama.cpp reads rotary frequencies from a tensor, and rotates neighbours instead of halves."""
_BLOCK = 32  # weights of a row that share a scale in Q8_0


@dataclass(frozen=True)
class Stored:
    """A tensor of the file. kind: its type there."""

    name: str
    hf_name: str
    shape: Shape
    kind: GGMLQuantizationType

    @property
    def byte_shape(self) -> tuple[int, ...]:
        """Return the shape as an array of the file's numbers; of blocks it is in bytes."""
        from gguf import GGMLQuantizationType, quant_shape_to_byte_shape

        return tuple(
            quant_shape_to_byte_shape(self.shape, self.kind) if self.kind == GGMLQuantizationType.Q8_0 else self.shape
        )

    @property
    def nbytes(self) -> int:
        return prod(self.byte_shape) * self.dtype.itemsize

    @property
    def dtype(self) -> np.dtype:
        import numpy as np

        return np.dtype({"F32": np.float32, "F16": np.float16}.get(self.kind.name, np.uint8))


def check_architecture(arch: Architecture) -> None:
    """Raise ConfigError for a model that llama.cpp would compute in another way, or not at all."""
    why = None
    gated = "gelu" if arch.family == "falcon" else "swiglu"
    windows = [arch.layer(number).attention.window for number in range(arch.num_layers)]
    if arch.family not in NAMES:
        why = f"is of the family {arch.family}"
    elif arch.activation != gated:
        why = f"has the activation {arch.activation} (llama.cpp's {NAMES[arch.family]}: {gated})"
    elif any(window and window < arch.max_position_embeddings for window in windows):
        why = "has layers with a sliding window"
    if why:
        raise ConfigError(f"this model {why}, which is not written as GGUF: choose another --quantize, or drop it")
    _rotation(arch)


def add_metadata(writer: GGUFWriter, arch: Architecture) -> None:
    """Write the sizes of a model."""
    writer.add_context_length(arch.max_position_embeddings)
    writer.add_embedding_length(arch.hidden_size)
    writer.add_block_count(arch.num_layers)
    writer.add_feed_forward_length(arch.ffn_hidden_size)
    writer.add_head_count(arch.num_attention_heads)
    writer.add_head_count_kv(arch.num_query_groups)
    writer.add_key_length(arch.head_dim)
    writer.add_value_length(arch.head_dim)
    writer.add_vocab_size(arch.vocab_size)
    writer.add_rope_dimension_count(arch.head_dim)
    if arch.norm == "layernorm":
        writer.add_layer_norm_eps(arch.norm_epsilon)
    else:
        writer.add_layer_norm_rms_eps(arch.norm_epsilon)
    if arch.family == "falcon":
        writer.add_tensor_data_layout("jploski")  # the order of query, key and value, see `arranged`
    _rotation(arch).add(writer)


@dataclass(frozen=True)
class _Rotation:
    """The rotary embedding: a base, a method of llama.cpp with its numbers, or a table of what each frequency is divided by."""

    base: float
    method: dict[str, Any]
    table: Tensor | None
    factor: float = 1.0
    """By which queries and keys are scaled, beyond what the method does."""

    def add(self, writer: GGUFWriter) -> None:
        from gguf import RopeScalingType

        writer.add_rope_freq_base(self.base)
        if self.method:
            kind = self.method["rope_type"]
            writer.add_rope_scaling_type(RopeScalingType.LINEAR if kind == "linear" else RopeScalingType.YARN)
            writer.add_rope_scaling_factor(self.method["factor"])
        if self.method.get("rope_type") == "yarn":
            writer.add_rope_scaling_orig_ctx_len(self.method["original_max_position_embeddings"])
            writer.add_rope_scaling_yarn_beta_fast(self.method.get("beta_fast", 32.0))
            writer.add_rope_scaling_yarn_beta_slow(self.method.get("beta_slow", 1.0))
        if abs(self.factor - 1) > 1e-6:
            writer.add_rope_scaling_attn_factors(self.factor)


def _rotation(arch: Architecture) -> _Rotation:
    """Return the rotary embedding. Raise ConfigError for one that llama.cpp does not have."""
    import math

    entries = family_of(arch).to_hf(arch)["rope_parameters"]
    base, kind, positions = entries["rope_theta"], entries["rope_type"], arch.max_position_embeddings
    if kind in ("default", "linear"):
        return _Rotation(base, entries if kind == "linear" else {}, None)
    factor = attention_factor(arch.rope_scaling, positions)
    if kind == "yarn" and entries.get("truncate", True):
        return _Rotation(base, entries, None, factor / (1 + 0.1 * math.log(max(1.0, entries["factor"]))))
    near, far = (
        inverse_frequencies(arch.head_dim, arch.rope_theta, arch.rope_scaling, positions, length)
        for length in (1, 4 * positions)
    )
    if NAMES.get(arch.family) not in _BY_TABLE or not torch.equal(near, far):
        raise ConfigError(
            f"llama.cpp has no rotary embedding of type {kind} for {arch.family}: choose another --quantize, or drop it"
        )
    return _Rotation(base, {}, inverse_frequencies(arch.head_dim, base, None, positions) / near, factor)


def extra_tensors(arch: Architecture) -> Iterator[tuple[Stored, np.ndarray]]:
    """Return tensors that are no weights: the table of the rotary embedding."""
    from gguf import GGMLQuantizationType

    table = _rotation(arch).table
    if table is not None:
        kind = GGMLQuantizationType.F32
        yield Stored("rope_freqs.weight", "", tuple(table.shape), kind), table.float().numpy()


def tensors_of(arch: Architecture, placed: Iterable[Placed], kind: GGMLQuantizationType) -> list[Stored]:
    """Return the tensors of a file, in the order of their weights. kind: of matrices; vectors and norms are F32."""
    from gguf import MODEL_ARCH, GGMLQuantizationType, get_tensor_name_map

    names = get_tensor_name_map(MODEL_ARCH[NAMES[arch.family].upper()], arch.num_layers)
    found = []
    for one in placed:
        for hf_name, shape in zip(one.hf_keys, one.rule.hf_shapes(arch), strict=True):
            name = names.get_name(hf_name, (".weight", ".bias"))
            assert name is not None, hf_name
            vector = len(shape) == 1 or name.endswith("_norm.weight")
            whole = kind != GGMLQuantizationType.Q8_0 or shape[-1] % _BLOCK == 0
            own = kind if whole else GGMLQuantizationType.F16
            found.append(Stored(name, hf_name, shape, GGMLQuantizationType.F32 if vector else own))
    return found


def arranged(arch: Architecture, stored: Stored, weight: Tensor) -> Tensor:
    """Return a tensor of Hugging Face with its rows in llama.cpp's order."""
    if NAMES[arch.family] in _BY_TABLE and ".q_proj." in stored.hf_name:
        return _neighbours(weight, arch.num_attention_heads)
    if NAMES[arch.family] in _BY_TABLE and ".k_proj." in stored.hf_name:
        return _neighbours(weight, arch.num_query_groups)
    if "query_key_value" in stored.hf_name:
        groups = weight.reshape(arch.num_query_groups, -1, arch.head_dim, weight.shape[1])
        parts = (groups[:, :-2], groups[:, -2], groups[:, -1])
        return torch.cat([part.reshape(-1, weight.shape[1]) for part in parts])
    return weight


def _neighbours(weight: Tensor, heads: int) -> Tensor:
    """Return rows in the order of the original Llama: those that are rotated together are neighbours, not half a head apart."""
    halves = weight.reshape(heads, 2, weight.shape[0] // heads // 2, *weight.shape[1:])
    return halves.transpose(1, 2).reshape(weight.shape)


def encoded(stored: Stored, weight: Tensor) -> np.ndarray:
    """Return the numbers of the file. Raise CheckpointError for weights beyond the range of fp16."""
    import numpy as np
    from gguf import quants

    values = weight.float().contiguous().numpy()
    with np.errstate(over="ignore", invalid="ignore"):
        found = quants.quantize(values, stored.kind)
    scales = found if found.dtype != np.uint8 else found.reshape(-1, _BLOCK + 2)[:, :2].copy().view(np.float16)
    if not np.isfinite(scales).all():
        raise CheckpointError(f"{stored.hf_name} has numbers beyond fp16, which GGUF's types need: drop --quantize")
    return found


def decoded(stored: Stored, values: np.ndarray) -> Tensor:
    """Return the weights that a file holds."""
    from gguf import quants

    return torch.from_numpy(quants.dequantize(values, stored.kind).astype("float32"))
