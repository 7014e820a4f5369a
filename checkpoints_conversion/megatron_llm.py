"""Reads Megatron-LLM's variant of the classic format: release files of its converters and checkpoints saved in training.

Differences from megatron-core: names are under model.language_model; query and key rows are interleaved for its rotary embedding (row
2j belongs to j, row 2j+1 to j + D/2); each rank has [up; gate] instead of [gate; up]; word embeddings are in a separate dict or flat.
The architecture is in the pickled `args`, of which only plain values are read.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from megatron_ft.checkpoints.folder import CheckpointConfig, rank_file
from megatron_ft.errors import CheckpointError
from megatron_ft.models.architecture import Architecture
from megatron_ft.models.dtypes import name_of
from megatron_ft.models.families import family_of
from megatron_ft.models.torch_file import Inert, TensorRef, TorchFile
from megatron_ft.models.weights import Placed, placed_rules

_RENAMED = {
    "self_attention.query_key_value": "self_attention.linear_qkv",
    "attention.query_key_value": "self_attention.linear_qkv",
    "self_attention.dense": "self_attention.linear_proj",
    "attention.dense": "self_attention.linear_proj",
    "mlp.dense_h_to_4h": "mlp.linear_fc1",
    "mlp.dense_4h_to_h": "mlp.linear_fc2",
    "post_attention_layernorm": "pre_mlp_layernorm",
    "mlp_layernorm": "pre_mlp_layernorm",
    "input_layernorm": "input_layernorm",
}
_DEEPEST = 4  # largest depth of nested dictionaries
_ROOTS = ("embedding", "encoder", "transformer", "lm_head")
_NEEDED = ("num_layers", "hidden_size", "num_attention_heads", "ffn_hidden_size", "padded_vocab_size")


class MegatronLlmSource:
    """Opened rank files of release/ or iter_ folders. Raises CheckpointError with the file's name if one does not match.

    vocab_size: the true size, without padding, if it is known.
    """

    def __init__(self, folder: Path, iteration: int | str, vocab_size: int | None = None):
        self.folder = Path(folder)
        tp_size, pp_size = _layout(self.folder)
        paths = [[rank_file(self.folder, t, p, tp_size, pp_size) for t in range(tp_size)] for p in range(pp_size)]
        files = [[TorchFile(path, _harmless) for path in stage] for stage in paths]
        args = _args(files[0][0])
        arch = _architecture(args, vocab_size, files[0][0].path)
        self.rules = family_of(arch).rules(arch)
        self._parts: dict[str, list[TensorRef]] = {}
        for stage, opened in enumerate(files):
            ranks = [dict(_tensors(file)) for file in opened]
            for placed in placed_rules(arch, self.rules, pp_size, stage):
                if not placed.is_copy:
                    self._parts[placed.key] = [self._take(rank, placed, f) for rank, f in zip(ranks, opened)]
            left = {key for rank in ranks for key in rank if not key.startswith("copy.")}
            if left:
                raise CheckpointError(f"{opened[0].path} holds {sorted(left)[0]}, unknown to {arch.family} models")
        first = next(iter(self._parts.values()))[0]
        self.config = CheckpointConfig(
            architecture=arch,
            ckpt_format="torch",
            tensor_model_parallel_size=tp_size,
            pipeline_model_parallel_size=pp_size,
            padded_vocab_size=args["padded_vocab_size"],
            iteration=iteration,
            dtype=name_of(first.dtype, str(first.file.path)),
        )
        self._check_shapes()

    @staticmethod
    def _take(rank: dict[str, TensorRef], placed: Placed, file: TorchFile) -> TensorRef:
        if placed.local_key not in rank:
            raise CheckpointError(f"{file.path} lacks {placed.local_key} (in megatron-core's name)")
        return rank.pop(placed.local_key)

    def _check_shapes(self) -> None:
        config = self.config
        for placed in placed_rules(config.architecture, self.rules):
            wanted = placed.rule.part_shape(
                config.architecture, config.tensor_model_parallel_size, config.padded_vocab_size
            )
            for ref in self._parts[placed.key]:
                if ref.shape != wanted:
                    raise CheckpointError(
                        f"{ref.file.path}: {placed.local_key} is {list(ref.shape)}, its args have {list(wanted)}"
                    )

    def full(self, placed: Placed) -> Tensor:
        """Return the whole megatron-core tensor without padding rows."""
        arch = self.config.architecture
        parts = [_translated(arch, placed, ref.read()) for ref in self._parts[placed.key]]
        return placed.rule.join(arch, parts)

    def dtype(self, placed: Placed) -> torch.dtype:
        return self._parts[placed.key][0].dtype


def is_dialect(folder: Path) -> bool:
    """Return True for a folder with rank folders and without this project's config.json."""
    return not (folder / "config.json").exists() and any(Path(folder).glob("mp_rank_*"))


def _layout(folder: Path) -> tuple[int, int]:
    """Return (TP, PP) from the names of the folders: mp_rank_TT, or mp_rank_TT_PPP with several stages."""
    names = [path.name.split("_")[2:] for path in folder.glob("mp_rank_*") if path.is_dir()]
    try:
        ranks = {tuple(int(part) for part in (*name, "0")[:2]) for name in names}
        tp_size, pp_size = (max(axis) + 1 for axis in zip(*ranks))
    except ValueError as error:
        raise CheckpointError(f"{folder} holds no mp_rank_TT or mp_rank_TT_PPP folders; give a checkpoint") from error
    if len(ranks) != tp_size * pp_size:
        raise CheckpointError(
            f"{folder}: {len(ranks)} rank folders for TP{tp_size} x PP{pp_size}; restore the missing ones"
        )
    return tp_size, pp_size


def _harmless(module: str, name: str) -> bool:
    """Return True for the types of settings and random states, which are read as empty stand-ins."""
    if name == "Namespace":
        return True
    random = ("_reconstruct", "ndarray", "dtype", "scalar")
    return module.startswith("megatron.") or (
        (module.split(".")[0] == "numpy" and name in random) or (module, name) == ("_codecs", "encode")
    )


def _args(file: TorchFile) -> dict[str, Any]:
    state = file.value if isinstance(file.value, dict) else {}
    args = state.get("args")
    values = dict(vars(args)) if isinstance(args, Inert) else dict(args) if isinstance(args, dict) else {}
    missing = [key for key in _NEEDED if type(values.get(key)) is not int]
    if missing:
        raise CheckpointError(f"{file.path}: args lacks {', '.join(missing)}; it is not a Megatron-LLM checkpoint")
    return values


def _architecture(args: Mapping[str, Any], vocab_size: int | None, path: Path) -> Architecture:
    heads, padded = args["num_attention_heads"], args["padded_vocab_size"]
    if vocab_size is not None and not 0 < vocab_size <= padded:
        raise CheckpointError(f"{path}: vocabulary of {vocab_size} in {padded} padded rows; check the tokenizer")
    activation = args.get("glu_activation")
    parallel, window = bool(args.get("parallel_attn")), args.get("sliding_window_size")
    if activation not in (None, "swiglu", "geglu", "reglu") or args.get("use_bias"):
        what = "biases" if args.get("use_bias") else f"glu_activation {activation}"
        raise CheckpointError(f"{path}: {what} in the linears is not supported")
    factor = float(args.get("rope_scaling_factor") or 1.0)
    original = args.get("max_position_embeddings") or args.get("seq_length") or 2048
    return Architecture(
        family="falcon" if parallel else "mistral" if window else "llama",
        num_layers=args["num_layers"],
        hidden_size=args["hidden_size"],
        ffn_hidden_size=args["ffn_hidden_size"],
        num_attention_heads=heads,
        num_query_groups=args.get("num_attention_heads_kv") or heads,
        head_dim=args.get("kv_channels") or args["hidden_size"] // heads,
        vocab_size=vocab_size or padded,
        max_position_embeddings=original,
        norm_epsilon=args.get("layernorm_epsilon") or 1e-5,
        norm="rmsnorm" if args.get("use_rms_norm") else "layernorm",
        activation=activation or "gelu",
        tied_embeddings=bool(args.get("tie_embed_logits", True)),
        rope_theta=float(args.get("rope_theta") or 10000.0),
        rope_scaling={"rope_type": "linear", "factor": factor} if factor != 1.0 else None,
        parallel_block=parallel,
        shared_norm=parallel and not args.get("parallel_layernorm"),
        sliding_window=window or None,
    )


def _tensors(file: TorchFile) -> Iterator[tuple[str, TensorRef]]:
    """Yield (megatron-core's name with local layer number, tensor) for everything in a rank's model."""
    state = file.value
    model = state.get("model") if isinstance(state, dict) else None
    language = model.get("language_model") if isinstance(model, dict) else None
    if not isinstance(model, dict) or not isinstance(language, dict):
        raise CheckpointError(f"{file.path} has no model.language_model; it is not a Megatron-LLM checkpoint")
    for root, value in language.items():
        if root not in _ROOTS:
            raise CheckpointError(f"{file.path} holds language_model.{root}, which is unknown")
        for key, ref in _flat(value):
            yield _core_name(root, key), ref
    # With tied embeddings, the last of several stages has a copy of them, whose name differs between versions.
    for key, ref in _flat({key: value for key, value in model.items() if key != "language_model"}):
        yield f"copy.{key}", ref


def _flat(value: Any, name: str = "", depth: int = 0) -> Iterator[tuple[str, TensorRef]]:
    if isinstance(value, TensorRef):
        yield name, value
    elif isinstance(value, dict) and depth < _DEEPEST:  # a malicious dict may contain itself
        for key, inner in value.items():
            yield from _flat(inner, f"{name}.{key}" if name else str(key), depth + 1)


def _core_name(root: str, key: str) -> str:
    if root == "lm_head":
        return "output_layer.weight"
    if root == "embedding":
        return f"embedding.{key}"
    if not key.startswith("layers."):
        return f"decoder.{key}"
    _, number, rest = key.split(".", 2)
    name, _, kind = rest.rpartition(".")
    return f"decoder.layers.{number}.{_RENAMED.get(name, name)}.{kind}"


def _translated(arch: Architecture, placed: Placed, part: Tensor) -> Tensor:
    """Return one rank's tensor in megatron-core's order."""
    if placed.key.endswith("linear_qkv.weight"):
        return deinterleave(part, arch)
    if placed.rule.cut == "gated_column_parallel":
        up, gate = part.chunk(2)
        return torch.cat([gate, up])
    return part


def deinterleave(part: Tensor, arch: Architecture) -> Tensor:
    """Return the tensor [rows, h] with query and key rows as two halves per head; value rows are unchanged."""
    queries, dim = arch.num_attention_heads // arch.num_query_groups, arch.head_dim
    grouped = part.reshape(-1, queries + 2, dim, *part.shape[1:])
    turned = grouped[:, : queries + 1]
    halves = torch.cat([turned[:, :, 0::2], turned[:, :, 1::2]], dim=2)
    return torch.cat([halves, grouped[:, queries + 1 :]], dim=1).reshape(part.shape)
