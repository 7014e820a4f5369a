"""certificate.json: the result of a comparison and the hashes of the compared files, so that an export can check it."""

from __future__ import annotations

import json
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass
from importlib.metadata import version
from math import prod
from pathlib import Path
from typing import Any

import torch

from checkpoints_conversion.compare_nf4 import CODES, DEQUANTISED, PLAIN, compare_linear, in_words, is_compared
from checkpoints_conversion.megatron_source import Opened
from checkpoints_conversion.stream import WORKERS, Progress
from checkpoints_conversion.torch_zip import as_bytes
from megatron_ft.checkpoints.folder import CERTIFICATE
from megatron_ft.errors import CheckpointError, UserError
from megatron_ft.files import digest, read_json, write_json
from megatron_ft.models.activation_swap import SWAP, before_swap, swap_of
from megatron_ft.models.architecture import Architecture
from megatron_ft.models.dtypes import cast
from megatron_ft.models.hf_source import HfSource
from megatron_ft.models.rope import attention_factor, inverse_frequencies
from megatron_ft.models.weights import Placed, placed_rules

NAME = CERTIFICATE


@dataclass(frozen=True)
class Weights:
    """The result of compare_weights."""

    tensors: int
    parameters: int
    added_rows: int
    """Rows of added tokens, which the Hugging Face model does not have."""
    equal: str = PLAIN
    """What is equal: see compare_nf4."""


@dataclass(frozen=True)
class Certificate:
    """A certificate: its path and content."""

    path: Path
    content: dict[str, Any]

    def __str__(self) -> str:
        weights, answers = self.content["weights"], self.content["logits"]
        logits = "logits not compared"
        if answers:
            sizes = f"TP{answers['tensor_model_parallel_size']} x PP{answers['pipeline_model_parallel_size']}"
            reason = answers["in_one_process_because"]
            where = f"one process, because {reason}" if reason else sizes
            logits = f"logits of {answers['prompts']} prompts in {where} differ by at most {answers['largest_difference']:.1e}"
        base = "the base is unchanged, " if "base" in self.content else ""
        swap = self.content.get("activation_swap")
        swapped = f"activation swapped ({swap['from']} -> {swap['to']}), " if swap else ""
        return f"{base}{swapped}{in_words(weights['equal'], weights['tensors'])}, {logits} -> {self.path}"


def compare_weights(hf: Path, opened: Opened) -> Weights:
    """Compare every tensor with the Hugging Face model's, in the checkpoint's type. Raise CheckpointError for the first difference."""
    source = HfSource(hf)
    theirs, ours = source.arch, opened.config.architecture
    sizes = ("family", "num_layers", "hidden_size", "ffn_hidden_size", "num_attention_heads", "num_query_groups")
    for name in (
        *sizes,
        "head_dim",
        "tied_embeddings",
        "norm_epsilon",
        *([] if before_swap(theirs, ours) else ["activation"]),
        "sliding_window",
        "window_layers",
    ):
        if getattr(theirs, name) != getattr(ours, name):
            raise CheckpointError(f"{name}: {getattr(theirs, name)} in {hf}, {getattr(ours, name)} in {opened.folder}")
    _compare_rope(theirs, ours, hf, opened)
    progress = Progress("comparing", sum(path.stat().st_size for path in set(source.files.values())))
    pairs = list(zip(placed_rules(theirs, source.rules), placed_rules(ours, opened.rules), strict=True))

    def compare(pair: tuple[Placed, Placed]) -> tuple[int, str]:
        one, other = pair
        if is_compared(other, opened):
            equal = compare_linear(source, other, opened)
            progress.add(prod(one.rule.full_shape(theirs)) * source.dtype_of(one).itemsize)
            return prod(one.rule.full_shape(theirs)), equal
        mine = opened.full(other)
        full = cast(source.full(one), opened.config.dtype, one.key) if mine.dtype != source.dtype_of(one) else None
        full = source.full(one) if full is None else full
        rows = min(len(full), len(mine)) if one.rule.cut == "vocab_parallel" else len(full)
        if full.dtype != mine.dtype or as_bytes(full[:rows]) != as_bytes(mine[:rows]):
            raise CheckpointError(f"{one.key} differs between {hf} and {opened.folder}")
        progress.add(full.numel() * full.element_size())
        return full.numel(), PLAIN

    with ThreadPoolExecutor(WORKERS) as pool, progress:
        counts, kinds = zip(*pool.map(compare, pairs), strict=True)
    equal = next(kind for kind in (CODES, DEQUANTISED, PLAIN) if kind in kinds)
    tensors, added = sum(len(one.hf_keys) for one, _ in pairs), ours.vocab_size - theirs.vocab_size
    return Weights(tensors, sum(counts), added, equal)


def _compare_rope(theirs: Architecture, ours: Architecture, hf: Path, opened: Opened) -> None:
    """Raise CheckpointError unless the rotation angles are the same, within the context and beyond."""
    for length in (1, 4 * ours.max_position_embeddings):
        turns = []
        for arch in (theirs, ours):
            scaling, positions = arch.rope_scaling, arch.max_position_embeddings
            angles = inverse_frequencies(arch.head_dim, arch.rope_theta, scaling, positions, length)
            turns.append(angles * attention_factor(scaling, positions))
        if not torch.allclose(turns[0], turns[1], rtol=1e-5, atol=0):
            raise CheckpointError(f"RoPE differs between {hf} and {opened.folder}: base or scaling is not the same")


def make_certificate(
    hf: Path, opened: Opened, weights: Weights, answers: dict[str, Any] | None, base: dict[str, Any] | None = None
) -> Certificate:
    """Write the certificate beside the checkpoint's config.json and return it. base: of a checkpoint of adapters, its entry."""
    config = opened.config
    content: dict[str, Any] = {
        "checkpoint": hashes(opened.folder),
        "hf": {**hashes(hf, ("*.safetensors", "*.bin", "config.json", "adapter_config.json"))},
        **({"base": base} if base else {}),
        **({SWAP: config.architecture.hf[SWAP]} if swap_of(config.architecture) else {}),
        "layout": {
            "ckpt_format": config.ckpt_format,
            "tensor_model_parallel_size": config.tensor_model_parallel_size,
            "pipeline_model_parallel_size": config.pipeline_model_parallel_size,
        },
        "weights": {"equal": PLAIN, **asdict(weights)},
        "logits": answers,
        "versions": {name: version(name) for name in ("megatron_ft", "torch", "transformers", "megatron-core")},
    }
    content["digest"] = _content_digest(content)
    path = opened.folder / NAME
    write_json(path, content)
    return Certificate(path, content)


def hashes(
    folder: Path, patterns: tuple[str, ...] = ("config.json", "**/*.pt", "*.distcp", ".metadata")
) -> dict[str, str]:
    """Return name -> hash of a checkpoint's files."""
    found = sorted({path for pattern in patterns for path in folder.glob(pattern) if path.is_file()})
    with ThreadPoolExecutor(WORKERS) as pool:
        return dict(zip((str(path.relative_to(folder)) for path in found), pool.map(digest, found), strict=True))


def _content_digest(content: dict[str, Any]) -> str:
    """Return a hash of all entries but "digest", by which a damaged certificate is detected."""
    import xxhash

    rest = {key: value for key, value in content.items() if key != "digest"}
    return f"xxh3:{xxhash.xxh3_128_hexdigest(json.dumps(rest, sort_keys=True).encode())}"


def problem_with(folder: Path, trained: bool = False) -> str | None:
    """Return why a checkpoint is not certified; None if it has a certificate of its current files.

    trained: it has been trained since the conversion, so it can only be compared with its own export.
    """
    path = folder / NAME
    if not path.is_file():
        model = "EXPORT" if trained else "MODEL"
        return f"{folder} has no {NAME}; make one: megatron-ft verify --hf {model} --megatron {folder}"
    try:
        content = read_json(path)
    except UserError as error:
        return str(error)
    if not isinstance(content, dict) or content.get("digest") != _content_digest(content):
        return f"{path} is damaged, or from an older version; run megatron-ft verify again"
    if content.get("checkpoint") != hashes(folder):
        return f"{path} belongs to other files than those in the folder now; run megatron-ft verify again"
    return None
