"""megatron-ft merge-adapter: add adapters to the weights of their model and write a Hugging Face model."""

from __future__ import annotations

import sys
import time
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Literal

from checkpoints_conversion.options import CheckpointSource, Folders, Recommended, Written, check_folders
from megatron_ft.config.cli import Command, run_script

if TYPE_CHECKING:
    from checkpoints_conversion.report import Report


@dataclass(frozen=True)
class Merge(Recommended, CheckpointSource, Written, Folders):
    """Adapters and result"""

    input_dir: str = field(metadata={"required": True})
    """Adapters to merge: a checkpoint of a run with --lora_rank (its root, or one iter_ folder), or a PEFT folder."""
    output_dir: str = field(metadata={"required": True, "writes": "folder"})
    """Folder of the new Hugging Face model."""
    base: str | None = None
    """Checkpoint of the model that the adapters belong to; default: the one that they name. A PEFT folder names none."""
    onto: Literal["dequantized", "original"] | None = None
    """Weights to add adapters to that were trained on an NF4 base (QLoRA): its dequantised ones, which they were trained with (default), or
    the original ones; then --base is the checkpoint of the original model."""
    max_shard_size: str = "5GB"
    """Largest size of a safetensors file, such as 5GB or 200MB."""


COMMAND = Command(
    name="merge-adapter",
    summary="add adapters to the weights of their model and write a Hugging Face model",
    sections=(Merge,),
    examples=(
        "megatron-ft merge-adapter runs/adapters exports/merged --params_dtype fp16",
        "megatron-ft merge-adapter peft-adapter exports/merged --base checkpoints/llama2-13b",
        "megatron-ft merge-adapter runs/qlora exports/merged --base checkpoints/llama2-13b --onto original",
    ),
    positional=("input_dir", "output_dir"),
)


def run(options: Merge) -> None:
    print(merge(options))


def merge(options: Merge) -> Report:
    """Merge and return a report. output_dir appears only when everything is written. Raise UserError."""
    started = time.monotonic()
    check_folders(options, options.overwrite, set(), "config.json")
    # Imported here, so that --help and the checks above do not wait for torch.
    from checkpoints_conversion.card_prompt import prompt_section
    from checkpoints_conversion.megatron_to_hf import write_model
    from checkpoints_conversion.merged import open_merged
    from checkpoints_conversion.onto import IN_WORDS

    source = open_merged(Path(options.input_dir), options.base, options, options.params_dtype, options.onto)
    prompt_section(
        source.config, source.tokenizer, options.system
    )  # a mistake in it is found before weights are written
    report = write_model(source, options, options.max_shard_size, started, certified=False)
    return replace(report, note=f"merged onto {IN_WORDS[source.onto]}") if source.onto else report


if __name__ == "__main__":
    sys.exit(run_script(COMMAND, run))
