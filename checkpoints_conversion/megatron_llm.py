"""Reads Megatron-LLM's variant of the classic format: release files of its converters and checkpoints saved in training.

Differences from megatron-core: names are under model.language_model; query and key rows are interleaved for its rotary embedding (row
2j belongs to j, row 2j+1 to j + D/2); each rank has [up; gate] instead of [gate; up]; word embeddings are in a separate dict or flat.
The architecture is in the pickled `args` (megatron_llm_args.py).
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from checkpoints_conversion.megatron_llm_args import Stated, architecture, harmless, plain_args, warn_of_lost
from megatron_ft.checkpoints.folder import CheckpointConfig, rank_file
from megatron_ft.errors import CheckpointError
from megatron_ft.models.architecture import Architecture
from megatron_ft.models.dtypes import name_of
from megatron_ft.models.families import family_of
from megatron_ft.models.torch_file import TensorRef, TorchFile
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


class MegatronLlmSource:
    """Opened rank files of release/ or iter_ folders. Raises CheckpointError with the file's name if one does not match.

    vocab_size: the true size, without padding, if it is known. stated: settings that the user gives, which overrule those of the file.
    """

    def __init__(
        self, folder: Path, iteration: int | str, vocab_size: int | None = None, stated: Stated | None = None
    ) -> None:
        self.folder = Path(folder)
        tp_size, pp_size = _layout(self.folder)
        paths = [[rank_file(self.folder, t, p, tp_size, pp_size) for t in range(tp_size)] for p in range(pp_size)]
        files = [[TorchFile(path, harmless) for path in stage] for stage in paths]
        stages = [[dict(_tensors(file)) for file in stage] for stage in files]
        first_path, known = files[0][0].path, stated or {}
        saved = {**_sizes(stages[0]), **plain_args(files[0][0])}
        warn_of_lost(first_path, saved, known)
        args = {**saved, **known}
        arch = architecture(args, vocab_size, first_path)
        self.rules = family_of(arch).rules(arch)
        self._parts: dict[str, list[TensorRef]] = {}
        for stage, (opened, ranks) in enumerate(zip(files, stages, strict=True)):
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


def _sizes(ranks: Sequence[Mapping[str, TensorRef]]) -> dict[str, int]:
    """Return the settings that the first stage's tensors show; release files of Falcon have them nowhere else."""
    shown = {
        "padded_vocab_size": ("embedding.word_embeddings.weight", 0),
        "ffn_hidden_size": ("decoder.layers.0.mlp.linear_fc2.weight", 1),
    }
    return {
        name: ranks[0][key].shape[axis] * len(ranks)
        for name, (key, axis) in shown.items()
        if key in ranks[0] and len(ranks[0][key].shape) == 2
    }


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
