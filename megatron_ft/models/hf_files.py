"""Finds the files of a Hugging Face model's weights, and says of other files what they are and what to do with them."""

from __future__ import annotations

import re
from pathlib import Path

from megatron_ft.errors import CheckpointError

SAFE = ("model.safetensors", "model.safetensors.index.json")
PICKLED = ("pytorch_model.bin", "pytorch_model.bin.index.json")
FETCH_AGAIN = "fetch the file again"
_SHARD = re.compile(r"(model|pytorch_model)-(\d{5})-of-(\d{5})\.(safetensors|bin)")
_TO_TRANSFORMERS = "convert it with transformers first (from_pretrained, then save_pretrained)"
_FROM_MEGATRON = "use reshard or megatron-to-hf"
_CUT = "an unfinished download"
_RENAME = f"rename it to {PICKLED[0]} if it holds the weights"
_OTHERS = (  # pattern of names, what it is, what to do
    ("consolidated.*", "Meta's or Mistral's own format", _TO_TRANSFORMERS),
    (
        "adapter_model.*",
        "a PEFT adapter without its base model",
        "merge it into the base model first, or convert that and give the adapter to finetune --adapter",
    ),
    ("*.gguf", "a GGUF file", "give the model that it was made from"),
    ("tf_model.h5", "TensorFlow weights", _TO_TRANSFORMERS),
    ("flax_model.msgpack", "Flax weights", _TO_TRANSFORMERS),
    ("zero_to_fp32.py", "a checkpoint of DeepSpeed", "let that program write the weights into one file first"),
    ("pytorch_model_fsdp*", "a checkpoint of FSDP", "merge it with accelerate merge-weights first"),
    ("*.distcp", "a checkpoint of torch.distributed", "give the exported model"),
    ("mp_rank_*", "a Megatron checkpoint", _FROM_MEGATRON),
    ("latest_checkpointed_iteration.txt", "a Megatron checkpoint", _FROM_MEGATRON),
    ("checkpoint-*", "a checkpoint of transformers' Trainer", "give that folder"),
    ("*.onnx", "a graph of ONNX", "give the model that it was made from"),
    ("*.nemo", "an archive of NeMo", "export the model from NeMo first"),
    ("*.part", _CUT, FETCH_AGAIN),
    ("*.incomplete", _CUT, FETCH_AGAIN),
    ("*.aria2", _CUT, FETCH_AGAIN),
    ("*.crdownload", _CUT, FETCH_AGAIN),
    ("*.safetensors", "safetensors of another name", f"rename it to {SAFE[0]} if it holds all of the weights"),
    *((f"*.{end}", "a torch file of another name", _RENAME) for end in ("pt", "pth", "ckpt", "bin")),
)


def loose_shards(folder: Path) -> list[Path]:
    """Return the shards of a folder without an index: all those that their names count, [] if there are none.

    Raise CheckpointError naming the first that is missing.
    """
    for ending in ("safetensors", "bin"):
        found = {match[0]: match for path in folder.glob(f"*.{ending}") if (match := _SHARD.fullmatch(path.name))}
        if not found:
            continue
        stem, _, count, _ = next(iter(found.values())).groups()
        if int(count) > 10_000:
            raise CheckpointError(f"{folder}: shards that count {int(count)} files are no model's; {FETCH_AGAIN}")
        names = [f"{stem}-{number:05d}-of-{count}.{ending}" for number in range(1, int(count) + 1)]
        missing = [name for name in names if name not in found]
        if missing or len(found) != len(names):
            raise CheckpointError(
                f"{folder} has no index of its shards, and {len(found)} of {len(names)} shards"
                f"{f'; {missing[0]} is missing' if missing else ''}; {FETCH_AGAIN}"
            )
        return [folder / name for name in names]
    return []


def what_is_there(folder: Path) -> str:
    """Return what a folder without weights that are read contains instead, and what to do."""
    names = sorted(path.name for path in folder.iterdir())
    for pattern, what, remedy in _OTHERS:
        if found := next((name for name in names if Path(name).match(pattern)), None):
            return f"but {found}, {what}: {remedy}"
    return FETCH_AGAIN


def refuse_gguf(path: Path) -> None:
    """Raise CheckpointError for a GGUF file, or a folder with one and without config.json."""
    named = path.suffix == ".gguf" and path.is_file()
    if named or (path.is_dir() and not (path / "config.json").exists() and any(path.glob("*.gguf"))):
        raise CheckpointError(
            f"{path} is GGUF, which only llama.cpp reads: give the checkpoint that it was made from, or an export without --quantize"
        )
